// The chunks of a span forwards: their scores, p, and the state before each.
#pragma once
#include "delta_rule/backward_span.cuh"

namespace pyseq::delta_rule {
namespace {

template <class Policy, class S> struct Recompute : Span<Policy, S> {
  using Base = Span<Policy, S>;
  using Base::s, Base::p, Base::m, Base::lane, Base::warp;

  Tile H[S::kKeyTiles][S::kValueTiles];             // transposed
  Tile k_end[S::kKeyTiles], b_end[S::kKeyTiles];    // k and b decayed to the end of the chunk
  Vec<4> whole[S::kKeyTiles];                       // the decay of the chunk

  // Rows of upper halves are q and a, of lower ones k and b.
  __device__ __forceinline__ void add_scores(int n, Tile (&sum)[3], Decays& w, const Keys& x) const {
    using Exact = typename Policy::Exact;
    const auto add = [&](Tile& to, const Tile& left, const Tile& right) {
      Tile all{};
      Exact::multiply(all, Exact::a(left), Exact::b(right));
      const Tile mine = pairs(n, all, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) to.v[i / 4][i % 4] += mine.v[i / 4][i % 4];
    };
    const Tile first = halves(n, w.through * x.q, w.after * x.k, lane);
    add(sum[kQK], first, first);
    if (this->corrects()) {
      const Tile second = halves(n, w.before * x.a, w.after * x.b, lane);
      add(sum[kQB], first, second);
      add(sum[kAB], second, second);
    }
    w.join(n, lane);
  }
  // A token with itself: the diagonal of q x^T.
  __device__ __forceinline__ void add_diagonal(Tile& sum, const Tile& q, const Tile& x) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dot = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) dot = fmaf(q.v[i / 2][2 * half + i % 2], x.v[i / 2][2 * half + i % 2], dot);
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) sum.v[half][2 * half + r] += lane % 4 * 2 + r == lane / 4 ? dot : 0.f;
    }
  }

  __device__ __forceinline__ void leave_scores() {
    Tile sum[3] = {}, aS[S::kValueTiles] = {};
#pragma unroll
    for (int i = 0; i < S::kKeyTiles; ++i) {
      const int tile = this->tile(i);
      const Keys x = this->load_all(tile);
      Decays w(this->load_decays(tile));
      add_diagonal(sum[kQK], x.q, x.k);
      if (this->corrects()) add_diagonal(sum[kQB], x.q, x.b);
#pragma unroll 1
      for (int n = 0; n < kLevels; ++n) add_scores(n, sum, w, x);
      k_end[i] = w.after * x.k, b_end[i] = w.after * x.b, whole[i] = w.whole(lane);
      if (!this->corrects()) continue;
      const auto from_start = Policy::a(w.before * x.a);
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) Policy::multiply(aS[n], from_start, Policy::b(H[i][n]));
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) put(m.left[warp] + 256 * i, sum[i], lane);
    if (!this->corrects()) return;
#pragma unroll
    for (int n = 0; n < S::kValueTiles; ++n) put(m.left[warp] + 256 * (3 + n), aS[n], lane);
  }
  __device__ __forceinline__ void sum_scores(int chunk) const {
    float* const kept = this->kept_scores(chunk);
#pragma unroll 1
    for (int f = threadIdx.x; f < 192; f += S::kThreads) {
      Vec<4> sum = load_vec<4>(m.left[0] + 4 * f);
#pragma unroll
      for (int w = 1; w < S::kWarps; ++w) {
        const Vec<4> more = load_vec<4>(m.left[w] + 4 * f);
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] += more[r];
      }
      store_vec<4>(kept + 4 * f, sum);
      this->put_score(m.scores, f, sum);
    }
  }

  // 16 columns of p = (I - Aab)^-1 (Aak v + a S), a lane solving one.
  __device__ __forceinline__ void correct(int chunk, int n) const {
    Tile x = this->sum_left(256 * (3 + n));
    const Tile above = load_columns(m.scores + kQB * kScore, kStride, lane);
    const Tile Aak = tile_of([&](int i) {
      return column_of(lane, i) < row_of(lane, i) ? above.v[i / 4][i % 4] : 0.f;
    });
    Policy::multiply(x, Policy::a(Aak), Policy::b(load_columns(m.v + 16 * n, S::kRowStride, lane)));
    store_rows(m.p + 16 * n, S::kRowStride, x, lane);
    __syncwarp();
    if (lane < 16) {
      float* const column = m.p + 16 * n + lane;
      float* const kept = this->kept_p(chunk) + 16 * n + lane;
      float y[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) y[i] = column[i * S::kRowStride];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        column[i * S::kRowStride] = kept[i * S::kValues] = y[i];
        const float* const Aab = m.scores + kAB * kScore + i * kStride;   // symmetric: of the tokens after
#pragma unroll
        for (int j = i + 1; j < kChunk; ++j) y[j] = fmaf(Aab[j], y[i], y[j]);
      }
    }
  }

  __device__ __forceinline__ void advance() {
    float* const mine = m.left[warp];
#pragma unroll
    for (int i = 0; i < S::kKeyTiles; ++i) {
      store_rows(mine, kStride, k_end[i], lane);
      store_rows(mine + kScore, kStride, b_end[i], lane);
      __syncwarp();
      const auto k = Policy::b(load_columns(mine, kStride, lane));
      const auto b = Policy::b(load_columns(mine + kScore, kStride, lane));
      __syncwarp();
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) {
        Tile more{};   // tensor cores cut off what they add to a sum: long sums would err to one side
        Policy::multiply(more, Policy::a(load_columns(m.v + 16 * n, S::kRowStride, lane)), k);
        if (this->corrects()) Policy::multiply(more, Policy::a(load_columns(m.p + 16 * n, S::kRowStride, lane)), b);
        add_product(more, whole[i], H[i][n]);
        H[i][n] = more;
      }
    }
  }

  __device__ __forceinline__ void run() {
    const auto& w = this->where();
    const float* const kept = s.kept + ((w.slot + w.span) * s.heads + w.head) * s.keys * s.values;
#pragma unroll
    for (int i = 0; i < S::kKeyTiles; ++i)
#pragma unroll
      for (int n = 0; n < S::kValueTiles; ++n) H[i][n] = this->load_state(kept, this->tile(i), n);
#pragma unroll 1
    for (int chunk = 0; chunk * kChunk < this->where().count; ++chunk) {
      this->move(chunk);
      this->stage(m.v, s.v, p.wide_v);
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i)
#pragma unroll
        for (int n = 0; n < S::kValueTiles; ++n) put(this->state(chunk, this->tile(i), n), H[i][n], lane);
      leave_scores();
      __syncthreads();
      sum_scores(chunk);
      __syncthreads();
      if (this->corrects()) {
        if (warp < S::kValueTiles) correct(chunk, warp);
        __syncthreads();
      }
      if ((chunk + 1) * kChunk < this->where().count) advance();
    }
  }
};

}  // namespace
}  // namespace pyseq::delta_rule
