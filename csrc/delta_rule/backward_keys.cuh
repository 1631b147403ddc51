// A chunk backwards, what is per key: a warp has 16 keys at a time. For the equations see backward_gradient.cuh.
#pragma once
#include "delta_rule/backward_span.cuh"

namespace pyseq::delta_rule {
namespace {

template <class Policy, class S> struct KeyGradients : Span<Policy, S> {
  using Base = Span<Policy, S>;
  using Base::s, Base::p, Base::m, Base::lane, Base::warp;

  __device__ __forceinline__ Tile rows_of(const float* x, int n) const {
    return load_rows(x + 16 * n, S::kRowStride, lane);
  }
  __device__ __forceinline__ Tile columns_of(const float* x, int n) const {
    return load_columns(x + 16 * n, S::kRowStride, lane);
  }
  __device__ __forceinline__ float* G(int tile, int n) const { return m.G[tile] + 16 * n * kStride; }

  // q, k, a and b wait in shared memory.
  __device__ __forceinline__ float* kept(Key key) const { return m.left[warp] + S::kTurned + 256 * key; }
  __device__ __forceinline__ Tile get_key(Key key) const { return get(kept(key), lane); }
  __device__ __forceinline__ Tile get_half(int n, Key up, Key low) const {
    Tile x;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float* const from = kept(upper(n, lane, i) ? up : low) + (32 * (i / 4) + lane) * 4 + i % 4;
      const float2 y = *reinterpret_cast<const float2*>(from);
      x.v[i / 4][i % 4] = y.x, x.v[i / 4][i % 4 + 1] = y.y;
    }
    return x;
  }

  // What the pairs of one level add.
  __device__ __forceinline__ void add_level(int n, Keys& d, Tile& dg, Decays& w) const {
    float* const mine = m.left[warp];
    const Tile factors[2] = {halves(n, w.through, w.after, lane), halves(n, w.before, w.after, lane)};
    store_rows(mine, kStride, factors[0] * get_half(n, kQ, kK), lane);
    if (this->corrects()) store_rows(mine + kScore, kStride, factors[1] * get_half(n, kA, kB), lane);
    __syncwarp();
    Tile out[2] = {};
    {
      const auto first = Policy::b(load_columns(mine, kStride, lane));
      const float* const at = m.dscores;
      Policy::multiply(out[0], Policy::a(pairs(n, load_rows(at, kStride, lane), lane)), first);
      if (this->corrects()) {
        const auto second = Policy::b(load_columns(mine + kScore, kStride, lane));
        const auto score = [&](const Tile& y) { return Policy::a(pairs(n, y, lane)); };
        Policy::multiply(out[0], score(load_rows(at + kQB * kScore, kStride, lane)), second);
        Policy::multiply(out[1], score(load_columns(at + kQB * kScore, kStride, lane)), first);
        Policy::multiply(out[1], score(load_rows(at + kAB * kScore, kStride, lane)), second);
      }
    }
    __syncwarp();
    const Tile raw[2] = {get_half(n, kQ, kK), get_half(n, kA, kB)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool up = upper(n, lane, i);
      const int j = i / 4, r = i % 4;
      const float y = factors[0].v[j][r] * out[0].v[j][r], z = factors[1].v[j][r] * out[1].v[j][r];
      d.q.v[j][r] += up ? y : 0.f;
      d.k.v[j][r] += up ? 0.f : y;
      d.a.v[j][r] += up ? z : 0.f;
      d.b.v[j][r] += up ? 0.f : z;
      out[0].v[j][r] = raw[0].v[j][r] * y, out[1].v[j][r] = raw[1].v[j][r] * z;
    }
    if (s.g) add_halves(n, dg, out[0], out[1], lane);
    w.join(n, lane);
  }
  // Of a token with itself.
  __device__ __forceinline__ void add_diagonal(Keys& d) const {
    const Keys x{get_key(kQ), get_key(kK), get_key(kA), get_key(kB)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = i / 4, r = i % 4, at = row_of(lane, i) * (kStride + 1);
      const float qk = m.dscores[at];
      d.q.v[j][r] = fmaf(qk, x.k.v[j][r], d.q.v[j][r]);
      d.k.v[j][r] = fmaf(qk, x.q.v[j][r], d.k.v[j][r]);
      if (!this->corrects()) continue;
      const float qb = m.dscores[kQB * kScore + at];
      d.q.v[j][r] = fmaf(qb, x.b.v[j][r], d.q.v[j][r]);
      d.b.v[j][r] = fmaf(qb, x.q.v[j][r], d.b.v[j][r]);
    }
  }

  // What the states before and behind the chunk add.
  __device__ __forceinline__ void add_states(Keys& d, Tile& dg, const Tile& decays, int chunk, int tile) const {
    float* const mine = m.left[warp];
    Decays w(decays);
    w.join_all(lane);
    float through[4] = {};   // S G, summed over the columns of S
    d = {};
#pragma unroll
    for (int n = 0; n < S::kValueTiles; ++n) {
      const Tile H = get(this->state(chunk, tile, n), lane), g = load_rows(G(tile, n), kStride, lane);
      store_rows(mine + n * kScore, kStride, H, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        through[i / 4 * 2 + i % 2] = fmaf(H.v[i / 4][i % 4], g.v[i / 4][i % 4], through[i / 4 * 2 + i % 2]);
    }
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < S::kValueTiles; ++n) {
      const auto H = Policy::b(load_columns(mine + n * kScore, kStride, lane));
      const auto g = Policy::b(load_columns(G(tile, n), kStride, lane));
      Policy::multiply(d.q, Policy::a(rows_of(m.dy, n)), H);
      Policy::multiply(d.k, Policy::a(rows_of(m.v, n)), g);
      if (!this->corrects()) continue;
      Policy::multiply(d.a, Policy::a(rows_of(m.dp, n)), H);
      Policy::multiply(d.b, Policy::a(rows_of(m.p, n)), g);
    }
    __syncwarp();
    d = {w.through * d.q, w.after * d.k, w.before * d.a, w.after * d.b};
    if (s.g) {
      Tile ahead = get_key(kK) * d.k;
      add_product(ahead, get_key(kB), d.b);
      add_chunk(dg, get_key(kQ) * d.q, get_key(kA) * d.a, ahead, lane);
      const Vec<4> whole = w.whole(lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int by = 4; by < 32; by *= 2) through[i] += __shfl_xor_sync(~0u, through[i], by);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& to = dg.v[i / 2][2 * half + i % 2];
          to = fmaf(whole[i], through[i], to);
        }
      }
    }
  }
  // G before the chunk. `w` is joined.
  __device__ __forceinline__ void retreat(const Decays& w, int tile) const {
    using Exact = typename Policy::Exact;
    float* const mine = m.left[warp];
    const Vec<4> whole = w.whole(lane);
    store_rows(mine, kStride, w.through * get_key(kQ), lane);
    if (this->corrects()) store_rows(mine + kScore, kStride, w.before * get_key(kA), lane);
    __syncwarp();
    const auto q = Exact::b(load_columns(mine, kStride, lane));
    const auto a = Exact::b(load_columns(mine + kScore, kStride, lane));
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < S::kValueTiles; ++n) {
      Tile more{};   // as in Recompute
      Exact::multiply(more, Exact::a(columns_of(m.dy, n)), q);
      if (this->corrects()) Exact::multiply(more, Exact::a(columns_of(m.dp, n)), a);
      add_product(more, whole, load_rows(G(tile, n), kStride, lane));
      store_rows(G(tile, n), kStride, more, lane);
    }
    __syncwarp();
  }
};

}  // namespace
}  // namespace pyseq::delta_rule
