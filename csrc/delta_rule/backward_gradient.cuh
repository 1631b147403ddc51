// A chunk backwards, with G that of the state behind it:
//
//   dp = (I - Aab)^-T (Aqb^T dy + B exp(gl - gi) G)       dv = Aqk^T dy + Aak^T dp + K exp(gl - gi) G
//   dAqk = dy v^T, dAqb = dy p^T, dAak = dp v^T, dAab = dp p^T, of which each is masked as the score is
//   dq = exp(gi) dy S^T + those that scores give      da = exp(ge) dp S^T + ...
//   dk = exp(gl - gi) v G^T + ...                     db = exp(gl - gi) p G^T + ...
//   G = exp(gl) G + (Q exp(gi))^T dy + (A exp(ge))^T dp
//
// dg of a token is the sum of x dx over all products x that its decay is a factor of, and of exp(gl) S G: with decays in
// levels no part enters it to leave again, as in differences of sums over the chunk.
#pragma once
#include "delta_rule/backward_span.cuh"

namespace pyseq::delta_rule {
namespace {

template <class Policy, class S> struct Gradient : Span<Policy, S> {
  using Base = Span<Policy, S>;
  using Base::s, Base::p, Base::m, Base::lane, Base::warp;

  __device__ __forceinline__ Tile rows_of(const float* x, int n) const {
    return load_rows(x + 16 * n, S::kRowStride, lane);
  }
  __device__ __forceinline__ Tile columns_of(const float* x, int n) const {
    return load_columns(x + 16 * n, S::kRowStride, lane);
  }
  __device__ __forceinline__ float* G(int tile, int n) const { return m.G[tile] + 16 * n * kStride; }

  __device__ __forceinline__ void stage_chunk(int chunk) const {
    this->stage(m.v, s.v, p.wide_v);
    this->stage(m.dy, s.dy, p.wide_dy);
    const float* const scores = this->kept_scores(chunk);
#pragma unroll 1
    for (int f = threadIdx.x; f < 192; f += S::kThreads) this->put_score(m.scores, f, load_vec<4>(scores + 4 * f));
    if (!this->corrects()) return;
    const float* const kept = this->kept_p(chunk);
#pragma unroll
    for (int i = threadIdx.x; i < kChunk * S::kValues / 4; i += S::kThreads) {
      const int token = i / (S::kValues / 4), column = i % (S::kValues / 4) * 4;
      store_vec<4>(m.p + token * S::kRowStride + column, load_vec<4>(kept + 4 * i));
    }
  }

  // k and b, decayed to the end, times G.
  __device__ __forceinline__ void leave_products() const {
    using Exact = typename Policy::Exact;
    Tile kG[S::kValueTiles] = {}, bG[S::kValueTiles] = {};
#pragma unroll 1
    for (int i = 0; i < S::kKeyTiles; ++i) {
      const int tile = this->tile(i);
      Decays w(this->load_decays(tile));
      w.join_all(lane);
      const auto k = Policy::a(w.after * this->load_keys(s.k, p.wide_k, tile));
      const auto b = Exact::a(w.after * this->load_keys(s.b, p.wide_b, tile));
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) {
        const Tile g = load_rows(G(tile, n), kStride, lane);
        Policy::multiply(kG[n], k, Policy::b(g));
        if (this->corrects()) Exact::multiply(bG[n], b, Exact::b(g));
      }
    }
#pragma unroll
    for (int n = 0; n < S::kValueTiles; ++n) {
      put(m.left[warp] + 256 * n, kG[n], lane);
      if (this->corrects()) put(m.left[warp] + 256 * (S::kValueTiles + n), bG[n], lane);
    }
  }

  // 16 columns of dp, a lane solving one.
  __device__ __forceinline__ void correct(int n) const {
    Tile x = this->sum_left(256 * (S::kValueTiles + n));
    const Tile below = load_columns(m.scores + kQB * kScore, kStride, lane);
    const Tile Aqb = tile_of([&](int i) {
      return column_of(lane, i) >= row_of(lane, i) ? below.v[i / 4][i % 4] : 0.f;
    });
    using Exact = typename Policy::Exact;
    Exact::multiply(x, Exact::a(Aqb), Exact::b(columns_of(m.dy, n)));
    store_rows(m.dp + 16 * n, S::kRowStride, x, lane);
    __syncwarp();
    if (lane < 16) {
      float* const column = m.dp + 16 * n + lane;
      float y[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) y[i] = column[i * S::kRowStride];
#pragma unroll
      for (int i = kChunk - 1; i >= 0; --i) {
        column[i * S::kRowStride] = y[i];
        const float* const Aab = m.scores + kAB * kScore + i * kStride;
#pragma unroll
        for (int j = 0; j < i; ++j) y[j] = fmaf(Aab[j], y[i], y[j]);
      }
    }
  }

  // Warp 0 dAqk, 1 dAqb, 2 dAak, 3 dAab.
  __device__ __forceinline__ void score_gradients() const {
    if (warp >= (this->corrects() ? 4 : 1)) return;
    const float* const left = warp < 2 ? m.dy : m.dp, *const right = warp % 2 ? m.p : m.v;
    Tile d{};
#pragma unroll
    for (int n = 0; n < S::kValueTiles; ++n) {
      Policy::multiply(d, Policy::a(rows_of(left, n)), Policy::b(rows_of(right, n)));
    }
    float* const to = m.dscores + (warp == 0 ? kQK : warp < 3 ? kQB : kAB) * kScore;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = row_of(lane, i), column = column_of(lane, i);
      const float x = d.v[i / 4][i % 4];
      if (row < column || (row == column && warp == 2)) continue;
      if (warp != 2) to[row * kStride + column] = x;
      if (warp != 1) to[column * kStride + row] = x;
    }
  }
  __device__ __forceinline__ void store_dv(int n) const {
    Tile dv = this->sum_left(256 * n);
    const auto upper = [&](int score, bool diagonal) {
      const Tile x = load_rows(m.scores + score * kScore, kStride, lane);
      return Policy::a(tile_of([&](int i) {
        return row_of(lane, i) < column_of(lane, i) + diagonal ? x.v[i / 4][i % 4] : 0.f;
      }));
    };
    Policy::multiply(dv, upper(kQK, true), Policy::b(columns_of(m.dy, n)));
    if (this->corrects()) Policy::multiply(dv, upper(kQB, false), Policy::b(columns_of(m.dp, n)));
    const int64_t first = this->where().part * S::kValues + 16 * n + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      const Vec<4> four{{dv.v[0][2 * half], dv.v[0][2 * half + 1], dv.v[1][2 * half], dv.v[1][2 * half + 1]}};
      if (token < this->tokens && first < s.values)
        store_four(s.dv, this->at(s.dv, token, first), four, p.wide_dv, s.values - first);
    }
  }

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
    const auto q = Exact::b(load_columns(mine, kStride, lane)), a = Exact::b(load_columns(mine + kScore, kStride, lane));
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

  __device__ __forceinline__ void store_gradients(int chunk) const {
    float of_head[2] = {};
#pragma unroll 1
    for (int i = 0; i < S::kKeyTiles; ++i) {
      const int tile = this->tile(i);
      {
        const Keys x = this->load_all(tile);
        put(kept(kQ), x.q, lane);
        put(kept(kK), x.k, lane);
        put(kept(kA), x.a, lane);
        put(kept(kB), x.b, lane);
      }
      const Tile decays = this->load_decays(tile);
      Keys d;
      Tile dg{};
      add_states(d, dg, decays, chunk, tile);
      add_diagonal(d);
      Decays w(decays);
#pragma unroll 1
      for (int n = 0; n < kLevels; ++n) add_level(n, d, dg, w);
#pragma unroll
      for (int j = 0; j < 8; ++j) d.q.v[j / 4][j % 4] *= s.scale;
      this->store_keys(p.dq, p.wide_dq, p.slab, d.q, tile);
      this->store_keys(p.dk, p.wide_dk, p.slab, d.k, tile);
      if (this->corrects()) {
        this->store_keys(p.da, p.wide_da, p.slab, d.a, tile);
        this->store_keys(p.db, p.wide_db, p.slab, d.b, tile);
      }
      if (s.g && !s.one_decay) this->store_keys(p.dg, p.wide_dg, p.slab_g, dg, tile);
#pragma unroll
      for (int j = 0; j < 8; ++j) of_head[j % 4 / 2] += dg.v[j / 4][j % 4];
      retreat(w, tile);
    }
    if (!s.one_decay) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int by = 1; by < 4; by *= 2) of_head[half] += __shfl_xor_sync(~0u, of_head[half], by);
      if (lane % 4 == 0) m.dg[warp][lane / 4 + 8 * half] = of_head[half];
    }
    __syncthreads();
    if (threadIdx.x < this->tokens) {
      float sum = 0.f;
      for (int w = 0; w < S::kWarps; ++w) sum += m.dg[w][threadIdx.x];
      store(p.dg, this->where().part * p.slab_g + this->at(p.dg, threadIdx.x, 0), sum);
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int chunk = (this->where().count - 1) / kChunk; chunk >= 0; --chunk) {
      this->move(chunk);
      stage_chunk(chunk);
      leave_products();
      __syncthreads();
      if (this->corrects()) {
        if (warp < S::kValueTiles) correct(warp);
        __syncthreads();
      }
      score_gradients();
      if (warp < S::kValueTiles) store_dv(warp);
      __syncthreads();
      store_gradients(chunk);
    }
  }
};

}  // namespace
}  // namespace pyseq::delta_rule
