// A chunk backwards, with G that of the state behind it:
//
//   dp = (I - Aab)^-T (Aqb^T dy + B exp(gl - gi) G)       dv = Aqk^T dy + Aak^T dp + K exp(gl - gi) G
//   dAqk = dy v^T, dAqb = dy p^T, dAak = dp v^T, dAab = dp p^T, of which each is masked as the score is
//   dq = exp(gi) dy S^T + those that scores give      da = exp(ge) dp S^T + ...
//   dk = exp(gl - gi) v G^T + ...                     db = exp(gl - gi) p G^T + ...
//   G = exp(gl) G + (Q exp(gi))^T dy + (A exp(ge))^T dp
//
// dg of a token is the sum of x dx over all products x that its decay is a factor of, and of exp(gl) S G: with decays
// in levels no part enters it to leave again, as in differences of sums over the chunk.
#pragma once
#include "delta_rule/backward_keys.cuh"

namespace pyseq::delta_rule {
namespace {

template <class Policy, class S> struct Gradient : KeyGradients<Policy, S> {
  using Base = KeyGradients<Policy, S>;
  using Base::s, Base::p, Base::m, Base::lane, Base::warp;

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
        const Tile g = load_rows(this->G(tile, n), kStride, lane);
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
    Exact::multiply(x, Exact::a(Aqb), Exact::b(this->columns_of(m.dy, n)));
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
      Policy::multiply(d, Policy::a(this->rows_of(left, n)), Policy::b(this->rows_of(right, n)));
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
    Policy::multiply(dv, upper(kQK, true), Policy::b(this->columns_of(m.dy, n)));
    if (this->corrects()) Policy::multiply(dv, upper(kQB, false), Policy::b(this->columns_of(m.dp, n)));
    const int64_t first = this->where().part * S::kValues + 16 * n + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      const Vec<4> four{{dv.v[0][2 * half], dv.v[0][2 * half + 1], dv.v[1][2 * half], dv.v[1][2 * half + 1]}};
      if (token < this->tokens && first < s.values)
        store_four(s.dv, this->at(s.dv, token, first), four, p.wide_dv, s.values - first);
    }
  }

  __device__ __forceinline__ void store_gradients(int chunk) const {
    float of_head[2] = {};
#pragma unroll 1
    for (int i = 0; i < S::kKeyTiles; ++i) {
      const int tile = this->tile(i);
      {
        const Keys x = this->load_all(tile);
        put(this->kept(kQ), x.q, lane);
        put(this->kept(kK), x.k, lane);
        put(this->kept(kA), x.a, lane);
        put(this->kept(kB), x.b, lane);
      }
      const Tile decays = this->load_decays(tile);
      Keys d;
      Tile dg{};
      this->add_states(d, dg, decays, chunk, tile);
      this->add_diagonal(d);
      Decays w(decays);
#pragma unroll 1
      for (int n = 0; n < kLevels; ++n) this->add_level(n, d, dg, w);
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
      this->retreat(w, tile);
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
