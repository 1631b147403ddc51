// One chunk and the heads of a block: what its warps hold, and the products that each half of them makes.
//
// Warps 0 to 3 have tokens j, 16 each: U, dx, <U, x>, <x, G B> and dB. Warps 4 to 7 have tokens i: E, the gradient of the steps
// between j and i, <dv, S C> and dC. dB, dC and E are summed over heads in registers.
#pragma once
#include "ssd/backward.cuh"
#include "ssd/operands.cuh"

namespace pyseq::ssd {
namespace {

constexpr int kRow = kBlockWidth + 8;   // padded against bank conflicts
template <class Policy> constexpr int kColumns = sizeof(typename Policy::T) == 2 ? 128 : 32;   // of a state, at a time
template <class Policy> constexpr int kState = kColumns<Policy> + 8;

template <class Policy, bool kSplit> struct Memory {
  using T = typename Policy::T;
  T B[kChunk][kState<Policy>], C[kChunk][kState<Policy>];
  union {
    struct { T S[kBlockWidth][kState<Policy>], G[kBlockWidth][kState<Policy>]; };
    float E[kChunk][kChunk + 4];
  };
  T x[kChunk][kRow];
  T dv[1 + kSplit][kChunk][kRow];       // and what rounding left of it
  float steps[kSteps * kChunk];
};

template <class Policy, bool kSplit> struct Local {
  using T = typename Policy::T;
  using A = typename Policy::A;
  static constexpr int kTiles = kColumns<Policy> / 16;

  const Ssd& s;
  const Plan& p;
  Memory<Policy, kSplit>& m;
  Chunk chunk;
  int64_t index, group, first_head;     // of the chunk
  int lane, tile;                       // tile: of 16 tokens
  bool ends;                            // this warp has tokens i
  Result scores[4];                     // <C[i], B[j]>, rows of this warp's tokens
  Result sum[kTiles];                   // dB or dC
  Result E[4];                          // columns j

  __device__ __forceinline__ int row(int r) const { return 16 * tile + lane / 4 + r / 2 * 8; }
  __device__ __forceinline__ int column(int n, int i) const { return 16 * n + i / 4 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ float step(Step what, int t) const { return m.steps[what * kChunk + t]; }
  // exp(L[i] - L[j]); exp(L[Q] - L[t]); exp(L[t])
  __device__ __forceinline__ float between(int i, int j) const {
    return decay(step(kHigh, i) - step(kHigh, j), step(kLow, i) - step(kLow, j));
  }
  __device__ __forceinline__ float to_end(int t) const { return between(kChunk - 1, t); }
  __device__ __forceinline__ float from_begin(int t) const { return decay(step(kHigh, t), step(kLow, t)); }

  template <class Row> static __device__ __forceinline__ Matrix<T> matrix(Row* rows, int stride, int row, int column) {
    return {&rows[row][column], stride};
  }
  // The sum of a row over its four lanes, to the head's row `part`.
  __device__ __forceinline__ void add_rows(const float (&x)[2], int64_t head, int part, bool first) const {
    float* const to = p.parts_of(s, index, head) + part * kChunk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v = x[i] + __shfl_xor_sync(~0u, x[i], 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (lane % 4 == 0) add(to + row(2 * i), v, first);
    }
  }
  static __device__ __forceinline__ void add(float* to, float x, bool first) { *to = first ? x : *to + x; }

  // ---- what is brought in ----

  __device__ __forceinline__ void stage_shared(int64_t n, bool B, bool C) {
    const auto one = [&](T* to, const View& x, bool wide) {
      const int64_t at = chunk.row * x.stride[0] + chunk.begin * x.stride[1] + group * x.stride[2] + n;
      stage<kColumns<Policy>>(to, kState<Policy>, x, at, x.stride[1], chunk.count, s.states - n, wide);
    };
    if (B) one(&m.B[0][0], s.B, p.wide_B);
    if (C) one(&m.C[0][0], s.C, p.wide_C);
  }
  __device__ __forceinline__ void stage_state(T (*to)[kState<Policy>], float* all, int64_t head, int64_t channel, int64_t n) {
    const T* const from = p.template state_of<T>(all, s, index, head) + channel * p.states + n;
    constexpr int kEights = kColumns<Policy> / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kBlockWidth * kEights; i += kThreads) {
      const int row = i / kEights, column = i % kEights * 8;
      Vec<8> v{};
      if (channel + row < s.width && n + column < p.states) v = load_vec<8>(from + row * p.states + column);
      store_vec<8>(&to[row][column], v);
    }
  }
  __device__ __forceinline__ void stage_tokens(int64_t head, int64_t channel, bool first) {
    stage<kBlockWidth>(&m.x[0][0], kRow, s.x, chunk.row * s.x.stride[0] + chunk.begin * s.x.stride[1] + head * s.x.stride[2] + channel,
                       s.x.stride[1], chunk.count, s.width - channel, p.wide_x);
    constexpr int kEights = kBlockWidth / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * kEights; i += kThreads) {
      const int t = i / kEights, column = i % kEights * 8;
      Vec<8> v{};
      if (t < chunk.count) {
        v = first ? gated<true>(s, p, chunk.row, chunk.begin + t, head, channel + column)
                  : gated<false>(s, p, chunk.row, chunk.begin + t, head, channel + column);
      }
      store_vec<8>(&m.dv[0][t][column], v);
      if constexpr (kSplit) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          T rounded;
          store(&rounded, v[k]);
          v[k] -= load(&rounded);
        }
        store_vec<8>(&m.dv[1][t][column], v);
      }
    }
    const float* const steps = p.steps_of(s, index, head);
    for (int i = threadIdx.x; i < kSteps * kChunk; i += kThreads) m.steps[i] = steps[i];
  }

  // ---- products ----

  __device__ __forceinline__ void add_scores() {
    const auto* const mine = ends ? m.C : m.B;
    const auto* const other = ends ? m.B : m.C;
#pragma unroll 1
    for (int k = 0; k < kColumns<Policy>; k += 16) {
      const A a = Policy::template load_a<false>({const_cast<T*>(&mine[16 * tile][k]), kState<Policy>}, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Policy::multiply(scores[n], a,
                         Policy::template load_b<true>({const_cast<T*>(&other[16 * n][k]), kState<Policy>}, lane));
      }
    }
  }

  // U += B G^T
  __device__ __forceinline__ void add_from_state(Result (&U)[4]) const {
#pragma unroll 1
    for (int k = 0; k < kColumns<Policy>; k += 16) {
      const A a = Policy::template load_a<false>({&m.B[16 * tile][k], kState<Policy>}, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Policy::multiply(U[n], a, Policy::template load_b<true>({&m.G[16 * n][k], kState<Policy>}, lane));
      }
    }
  }
  __device__ __forceinline__ void row_dots(float (&dots)[2], const Result (&U)[4]) const {
    dots[0] = dots[1] = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float2 x = Policy::pair(&m.x[row(r)][column(n / 2, n % 2 * 4)]);
        dots[r / 2] = fmaf(U[n / 2][n % 2][r], x.x, fmaf(U[n / 2][n % 2][r + 1], x.y, dots[r / 2]));
      }
  }
  // U = exp(L[Q] - L) U + sum over i of <C[i], B> exp(L[i] - L) dv[i]
  __device__ __forceinline__ void add_from_tokens(Result (&U)[4]) const {
    const float end[2] = {to_end(row(0)), to_end(row(2))};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 8; ++i) U[n][i / 4][i % 4] *= end[i % 4 / 2];
#pragma unroll
    for (int it = 0; it < 4; ++it) {
      if (it < tile) continue;
      Result M;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int from = row(i % 4), to = column(it, i);
        M[i / 4][i % 4] = from <= to ? scores[it][i / 4][i % 4] * between(to, from) : 0.f;
      }
      const typename Policy::Split a = Policy::split(M);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Policy::multiply(U[n], a, Policy::template load_b<false>({const_cast<T*>(&m.dv[0][16 * it][16 * n]), kRow}, lane));
        if constexpr (kSplit) {
          Policy::multiply(U[n], a.hi,
                           Policy::template load_b<false>({const_cast<T*>(&m.dv[1][16 * it][16 * n]), kRow}, lane));
        }
      }
    }
  }
  __device__ __forceinline__ float2 dv_pair(int t, int channel) const {
    float2 v = Policy::pair(&m.dv[0][t][channel]);
    if constexpr (kSplit) {
      const float2 rest = Policy::pair(&m.dv[1][t][channel]);
      v.x += rest.x, v.y += rest.y;
    }
    return v;
  }
  // dx = delta U + D dv
  __device__ __forceinline__ void store_dx(const Result (&U)[4], int64_t head, int64_t channel) const {
    const float* const D = s.D ? s.D + head * s.D_width : nullptr;
    const bool each = s.D_width > 1;
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const float delta = step(kDelta, row(r));
      const int64_t at = chunk.row * s.dx.stride[0] + (chunk.begin + row(r)) * s.dx.stride[1] + head * s.dx.stride[2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int c = column(n / 2, n % 2 * 4);
        const int64_t left = s.width - channel - c;
        const float2 dv = dv_pair(row(r), c);
        Vec<2> dx = {{delta * U[n / 2][n % 2][r], delta * U[n / 2][n % 2][r + 1]}};
        if (D) {
          dx[0] = fmaf(left > 0 ? D[each ? channel + c : 0] : 0.f, dv.x, dx[0]);
          dx[1] = fmaf(left > 1 ? D[each ? channel + c + 1 : 0] : 0.f, dv.y, dx[1]);
        }
        if (row(r) < chunk.count) store_vec<2>(s.dx, at + channel + c, dx, p.wide_dx, left);
      }
    }
  }
  // dD of this warp's tokens.
  __device__ __forceinline__ void store_skip(int64_t head, int64_t channel) const {
    float* const to = p.skips + ((4 * index + tile) * s.heads + head) * s.D_width;
    float all = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int c = column(n / 2, n % 2 * 4);
      float both[2] = {0.f, 0.f};
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float2 x = Policy::pair(&m.x[row(r)][c]), dv = dv_pair(row(r), c);
        both[0] = fmaf(x.x, dv.x, both[0]), both[1] = fmaf(x.y, dv.y, both[1]);
      }
      if (s.D_width > 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          for (int d = 4; d < 32; d *= 2) both[i] += __shfl_xor_sync(~0u, both[i], d);
          if (lane < 4 && channel + c + i < s.width) to[channel + c + i] = both[i];
        }
      } else {
        all += both[0] + both[1];
      }
    }
    if (s.D_width > 1) return;
    for (int d = 1; d < 32; d *= 2) all += __shfl_xor_sync(~0u, all, d);
    if (lane == 0) add(to, all, channel == 0);
  }

  // E of this head, and of what its products with the scores have between j and i.
  __device__ __forceinline__ void add_E(int64_t head, bool first) {
    A dv[1 + kSplit][4];
#pragma unroll
    for (int i = 0; i <= kSplit; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) dv[i][k] = Policy::template load_a<false>({&m.dv[i][16 * tile][16 * k], kRow}, lane);
    float* const to = p.parts_of(s, index, head) + (kBetween + tile) * kChunk;
    float ahead[2] = {0.f, 0.f};   // of each row, the sum over all tiles before
#pragma unroll
    for (int jt = 0; jt < 4; ++jt) {
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
      if (jt <= tile) {
        Result e = {}, W, between_j;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const typename Policy::B x = Policy::template load_b<true>({&m.x[16 * jt][16 * k], kRow}, lane);
#pragma unroll
          for (int i = kSplit; i >= 0; --i) Policy::multiply(e, dv[i][k], x);
        }
        float rows[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int from = column(jt, i), end = row(i % 4);
          float& x = e[i / 4][i % 4];
          x = from <= end ? x * between(end, from) * step(kDelta, from) : 0.f;
          E[jt][i / 4][i % 4] += x;
          W[i / 4][i % 4] = from <= end ? x * scores[jt][i / 4][i % 4] : 0.f;
          rows[i % 4 / 2] += W[i / 4][i % 4];
          between_j[i / 4][i % 4] = ahead[i % 4 / 2];
        }
        Policy::multiply(between_j, Policy::split(W), Policy::ones_above(lane));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (column(jt, i) <= row(i % 4)) sums[i / 4 * 2 + i % 2] += between_j[i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rows[i] += __shfl_xor_sync(~0u, rows[i], 1);
          ahead[i] += rows[i] + __shfl_xor_sync(~0u, rows[i], 2);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int d = 4; d < 32; d *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], d);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lane < 4) add(to + 16 * jt + i / 2 * 8 + lane * 2 + i % 2, sums[i], first);
      }
    }
  }

  // dB += exp(L[Q] - L) delta G^T x
  __device__ __forceinline__ void add_dB() {
    A x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = Policy::template load_a<false>({&m.x[16 * tile][16 * k], kRow}, lane);
    const float weight[2] = {to_end(row(0)) * step(kDelta, row(0)), to_end(row(2)) * step(kDelta, row(2))};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Result d = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Policy::multiply(d, x[k], Policy::template load_b<false>({&m.G[16 * k][16 * n], kState<Policy>}, lane));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[n][i / 4][i % 4] = fmaf(weight[i % 4 / 2], d[i / 4][i % 4], sum[n][i / 4][i % 4]);
    }
  }
  // dC += exp(L) S^T dv, and <dv, S C>, <G, S>.
  __device__ __forceinline__ void add_dC(int64_t head, bool first) {
    A dv[1 + kSplit][4];
#pragma unroll
    for (int i = 0; i <= kSplit; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) dv[i][k] = Policy::template load_a<false>({&m.dv[i][16 * tile][16 * k], kRow}, lane);
    const float weight[2] = {from_begin(row(0)), from_begin(row(2))};
    float dots[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Result d = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const typename Policy::B S = Policy::template load_b<false>({&m.S[16 * k][16 * n], kState<Policy>}, lane);
#pragma unroll
        for (int i = kSplit; i >= 0; --i) Policy::multiply(d, dv[i][k], S);
      }
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float2 C = Policy::pair(&m.C[row(i % 4)][column(n, i)]);
        const float a = d[i / 4][i % 4], b = d[i / 4][i % 4 + 1];
        dots[i % 4 / 2] = fmaf(a, C.x, fmaf(b, C.y, dots[i % 4 / 2]));
        sum[n][i / 4][i % 4] = fmaf(weight[i % 4 / 2], a, sum[n][i / 4][i % 4]);
        sum[n][i / 4][i % 4 + 1] = fmaf(weight[i % 4 / 2], b, sum[n][i / 4][i % 4 + 1]);
      }
    }
    add_rows(dots, head, kSCv, first);
    float inner = 0.f;
    constexpr int kEights = kColumns<Policy> / 8;
#pragma unroll 1
    for (int i = lane; i < 16 * kEights; i += 32) {
      const int p = 16 * tile + i / kEights, n = i % kEights * 8;
      const Vec<8> S = load_vec<8>(&m.S[p][n]), G = load_vec<8>(&m.G[p][n]);
#pragma unroll
      for (int k = 0; k < 8; ++k) inner = fmaf(S[k], G[k], inner);
    }
    for (int d = 1; d < 32; d *= 2) inner += __shfl_xor_sync(~0u, inner, d);
    if (lane == 0) add(p.inner + (index * s.heads + head) * 4 + tile, inner, first);
  }

  // dB += E^T C or dC += E B, over all heads; then the slabs.
  __device__ __forceinline__ void store_shared(int64_t block, int64_t n) {
    __syncthreads();   // S and G have been read
    if (ends) {
#pragma unroll
      for (int jt = 0; jt < 4; ++jt)
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          *reinterpret_cast<float2*>(&m.E[row(i % 4)][column(jt, i)]) = {E[jt][i / 4][i % 4], E[jt][i / 4][i % 4 + 1]};
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int k = ends ? 0 : tile; k < (ends ? tile + 1 : 4); ++k) {
      const typename Policy::Split a = ends ? Policy::template load_split<false>({&m.E[16 * tile][16 * k], kChunk + 4}, lane)
                                            : Policy::template load_split<true>({&m.E[16 * k][16 * tile], kChunk + 4}, lane);
      auto* const from = ends ? m.B : m.C;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        Policy::multiply(sum[i], a, Policy::template load_b<false>({&from[16 * k][16 * i], kState<Policy>}, lane));
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      if (row(r) >= chunk.count) continue;
      float* const to = p.slab_of(s, block, chunk.row, chunk.begin + row(r), group) + (ends ? p.states : 0) + n;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int c = column(i / 2, i % 2 * 4);
        if (n + c < p.states) {
          *reinterpret_cast<float2*>(to + c) = {sum[i / 2][i % 2][r], sum[i / 2][i % 2][r + 1]};
        }
      }
    }
  }
};

}  // namespace
}  // namespace pyseq::ssd
