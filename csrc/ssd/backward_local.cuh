// One chunk and the heads of a block: what its warps hold, and the products that each half of them makes.
//
// Warps 0 to 3 have tokens j, 16 each: U, dx, <U, x>, <x, G B> and dB. Warps 4 to 7 have tokens i: E, the gradient of the steps
// between j and i, <dv, S C> and dC. dB, dC and E are summed over heads in registers. What is in float16 is in units of its own,
// all 1 for Full.
#pragma once
#include "cuda/async.cuh"
#include "ssd/backward.cuh"
#include "cuda/operands.cuh"

namespace pyseq::ssd {
namespace {

constexpr int kRow = kBlockWidth + 8;   // padded against bank conflicts
template <class Policy> constexpr int kColumns = sizeof(typename Policy::T) == 2 ? 128 : 32;   // of a state, at a time
template <class Policy> constexpr int kState = kColumns<Policy> + 8;

// Of a block. It lies in shared memory, for registers are scarce.
struct Where {
  Chunk chunk;
  int index, group, block, first, last;   // index: of the chunk; heads [first, last)
};

template <class Policy> struct Memory {
  using T = typename Policy::T;
  T B[kChunk][kState<Policy>], C[kChunk][kState<Policy>];
  union {
    struct { T S[kBlockWidth][kState<Policy>], G[kBlockWidth][kState<Policy>]; };
    float E[kChunk][kChunk + 4];
  };
  T x[kChunk][kRow], dv[kChunk][kRow];
  T scores[kChunk][kRow];               // <C[i], B[j]> in row j, in units of both / p.less
  float steps[kSteps * kChunk];
  float inside[kChunk];                 // exp(L[t] - L of the first of the 16 tokens around t)
  float most[2][kThreads / 32];         // the largest numbers of B and C, of each warp
  float unit_B, unit_C, unit_x, unit_dv;
  Where where;
};

template <class Policy> struct Local {
  using T = typename Policy::T;
  using A = typename Policy::A;
  using Exact = typename Policy::Exact;
  static constexpr int kTiles = kColumns<Policy> / 16;

  const Ssd& s;
  const Plan& p;
  Memory<Policy>& m;
  int lane, tile;                       // tile: of 16 tokens
  bool ends;                            // this warp has tokens i
  Result sum[kTiles];                   // dB or dC
  Result E[4];                          // columns j; the other warps keep U there

  __device__ __forceinline__ int row(int r) const { return 16 * tile + lane / 4 + r / 2 * 8; }
  __device__ __forceinline__ int column(int n, int i) const { return 16 * n + i / 4 * 8 + lane % 4 * 2 + i % 2; }
  __device__ __forceinline__ float step(Step what, int t) const { return m.steps[what * kChunk + t]; }
  // exp(L[i] - L[j]); exp(L[Q] - L[t]); exp(L[t])
  __device__ __forceinline__ float between(int i, int j) const {
    return decay(step(kHigh, i) - step(kHigh, j), step(kLow, i) - step(kLow, j));
  }
  __device__ __forceinline__ float to_end(int t) const { return between(kChunk - 1, t); }
  __device__ __forceinline__ float from_begin(int t) const { return decay(step(kHigh, t), step(kLow, t)); }

  using Tile = Matrix<const T>;
  __device__ __forceinline__ float less() const { return Policy::kScaled ? p.less : 1.f; }
  __device__ __forceinline__ float scale(float unit) const { return Policy::kScaled ? inverse(unit) : 1.f; }
  __device__ __forceinline__ float state_unit(int which, int head, int channel, int n) const {
    if constexpr (!Policy::kScaled) return 1.f;
    return p.units_of(s, m.where.index, head, channel)[2 + which * p.column_blocks() + n / kStateColumns];
  }
  // The sum of a row over its four lanes, to the head's row `part`.
  __device__ __forceinline__ void add_rows(const float (&x)[2], int head, int part, bool first) const {
    float* const to = p.parts_of(s, m.where.index, head) + part * kChunk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v = x[i] + __shfl_xor_sync(~0u, x[i], 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (lane % 4 == 0) add(to + row(2 * i), v, first);
    }
  }
  static __device__ __forceinline__ void add(float* to, float x, bool first) { *to = first ? x : *to + x; }

  // ---- what is brought in ----

  __device__ __forceinline__ int64_t at_shared(const View& x) const {
    return m.where.chunk.row * x.stride[0] + m.where.chunk.begin * x.stride[1] + m.where.group * x.stride[2];
  }
  __device__ __forceinline__ void find_units() const {
    if constexpr (!Policy::kScaled) {
      if (threadIdx.x == 0) m.unit_B = m.unit_C = m.unit_x = m.unit_dv = 1.f;
    } else {
      const int warp = threadIdx.x / 32;
      const auto largest = [&](const View& x, bool wide) {
        const int eights = int(p.states / 8);
        float most = 0.f;
        for (int i = threadIdx.x; i < m.where.chunk.count * eights; i += kThreads) {
          const int n = i % eights * 8;
          const Vec<8> v = load_vec<8>(x, at_shared(x) + i / eights * x.stride[1] + n, wide, s.states - n);
#pragma unroll
          for (int k = 0; k < 8; ++k) most = fmaxf(most, fabsf(v[k]));
        }
        for (int d = 1; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        return most;
      };
      const float B = largest(s.B, p.wide_B), C = largest(s.C, p.wide_C);
      if (lane == 0) m.most[0][warp] = B, m.most[1][warp] = C;
      __syncthreads();
      if (threadIdx.x == 0) m.unit_B = common_unit(m.most[0]), m.unit_C = common_unit(m.most[1]);
    }
  }
  static __device__ __forceinline__ float common_unit(const float (&most)[kThreads / 32]) {
    float x = 0.f;
    for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, most[i]);
    return unit_of(x);
  }
  __device__ __forceinline__ void stage_shared(int n, bool B, bool C) {
    const auto one = [&](T* to, const View& x, bool wide, float unit) {
      stage<kColumns<Policy>>(to, kState<Policy>, x, at_shared(x) + n, x.stride[1], m.where.chunk.count, s.states - n, wide, scale(unit));
    };
    if (B) one(&m.B[0][0], s.B, p.wide_B, m.unit_B);
    if (C) one(&m.C[0][0], s.C, p.wide_C, m.unit_C);
  }
  __device__ __forceinline__ void stage_state(T (*to)[kState<Policy>], float* all, int head, int channel, int n) {
    const T* const from = p.template state_of<T>(all, s, m.where.index, head) + channel * p.states + n;
    constexpr int kWord = 16 / sizeof(T), kWords = kColumns<Policy> / kWord;
#pragma unroll 1
    for (int i = threadIdx.x; i < kBlockWidth * kWords; i += kThreads) {
      const int row = i / kWords, column = i % kWords * kWord;
      const bool there = channel + row < s.width && n + column < p.states;
      cp_async<16>(&to[row][column], from + (there ? row * int(p.states) + column : 0), there ? 16 : 0);
    }
  }
  __device__ __forceinline__ void stage_tokens(int head, int channel, bool first) {
    float unit_x = 1.f, unit_dv = 1.f;
    if constexpr (Policy::kScaled) {
      const float* const units = p.units_of(s, m.where.index, head, channel);
      unit_x = units[0], unit_dv = units[1];
      if (threadIdx.x == 0) m.unit_x = unit_x, m.unit_dv = unit_dv;
    }
    const int64_t at = m.where.chunk.row * s.x.stride[0] + m.where.chunk.begin * s.x.stride[1] + head * s.x.stride[2] + channel;
    stage<kBlockWidth>(&m.x[0][0], kRow, s.x, at, s.x.stride[1], m.where.chunk.count, s.width - channel, p.wide_x, scale(unit_x));
    constexpr int kEights = kBlockWidth / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * kEights; i += kThreads) {
      const int t = i / kEights, column = i % kEights * 8;
      Vec<8> v{};
      if (t < m.where.chunk.count) {
        v = first ? gated<true>(s, p, m.where.chunk.row, m.where.chunk.begin + t, head, channel + column)
                  : gated<false>(s, p, m.where.chunk.row, m.where.chunk.begin + t, head, channel + column);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] *= scale(unit_dv);
      store_vec<8>(&m.dv[t][column], v);
    }
    const float* const steps = p.steps_of(s, m.where.index, head);
    for (int i = threadIdx.x; i < kSteps * kChunk; i += kThreads) m.steps[i] = steps[i];
    if (const int t = threadIdx.x, begin = t / 16 * 16; t < kChunk) {
      m.inside[t] = decay(steps[kHigh * kChunk + t] - steps[kHigh * kChunk + begin],
                          steps[kLow * kChunk + t] - steps[kLow * kChunk + begin]);
    }
  }

  // ---- products ----

  __device__ __forceinline__ void clear_E() {
#pragma unroll
    for (int i = 0; i < 32; ++i) E[i / 8][i / 4 % 2][i % 4] = 0.f;
  }
  // One half of the warps has i < 32, the other the rest.
  __device__ __forceinline__ void add_scores(Result (&scores)[4]) const {
#pragma unroll 1
    for (int k = 0; k < kColumns<Policy>; k += 16) {
      const A a = Policy::template load_a<false>(Tile{&m.B[16 * tile][k], kState<Policy>}, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        Policy::multiply(scores[n], a, Policy::template load_b<true>(Tile{&m.C[32 * ends + 16 * n][k], kState<Policy>}, lane));
      }
    }
  }
  __device__ __forceinline__ void keep_scores(const Result (&scores)[4]) const {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const float* const x = &scores[i / 8][i / 4 % 2][i % 4];
      Policy::store_pair(&m.scores[row(i % 4)][32 * ends + column(i / 8, i % 8)], less() * x[0], less() * x[1]);
    }
  }

  // U = U times `scale`, + B G^T, in units of both.
  __device__ __forceinline__ void add_from_state(Result (&U)[4], float scale) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) U[i / 8][i / 4 % 2][i % 4] *= scale;
#pragma unroll 1
    for (int k = 0; k < kColumns<Policy>; k += 16) {
      const A a = Policy::template load_a<false>(Tile{&m.B[16 * tile][k], kState<Policy>}, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Policy::multiply(U[n], a, Policy::template load_b<true>(Tile{&m.G[16 * n][k], kState<Policy>}, lane));
      }
    }
  }
  // <U, x> of each row, times `unit`.
  __device__ __forceinline__ void row_dots(float (&dots)[2], const Result (&U)[4], float unit) const {
    dots[0] = dots[1] = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float2 x = Policy::pair(&m.x[row(r)][column(n / 2, n % 2 * 4)]);
        dots[r / 2] = fmaf(U[n / 2][n % 2][r], x.x, fmaf(U[n / 2][n % 2][r + 1], x.y, dots[r / 2]));
      }
    dots[0] *= unit, dots[1] *= unit;
  }
  // U = exp(L[Q] - L) U + sum over i of <C[i], B> exp(L[i] - L) dv[i], in units of token_unit().
  __device__ __forceinline__ float token_unit() const { return m.unit_B * m.unit_C * scale(p.less) * m.unit_dv; }
  __device__ __forceinline__ void add_from_tokens(Result (&U)[4], float unit_G) const {
    const float unit = unit_G * less() * scale(m.unit_C) * scale(m.unit_dv), end[2] = {unit * to_end(row(0)), unit * to_end(row(2))};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 8; ++i) U[n][i / 4][i % 4] *= end[i % 4 / 2];
#pragma unroll
    for (int it = 0; it < 4; ++it) {
      if (it < tile) continue;
      __syncwarp();   // or operands of several tiles are brought in before the first is used
      Result M;
      Policy::template load_result<false>(M, Tile{&m.scores[16 * tile][16 * it], kRow}, lane);
      if (it == tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int from = row(i % 4), to = column(it, i);
          M[i / 4][i % 4] = from <= to ? M[i / 4][i % 4] * between(to, from) : 0.f;
        }
      } else {
        const float first[2] = {between(16 * it, row(0)), between(16 * it, row(2))};
#pragma unroll
        for (int i = 0; i < 8; ++i) M[i / 4][i % 4] *= first[i % 4 / 2] * m.inside[column(it, i)];
      }
      const typename Policy::Computed a = Policy::computed(M);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Policy::multiply(U[n], a, Policy::template load_b<false>(Tile{&m.dv[16 * it][16 * n], kRow}, lane));
      }
    }
  }
  // dx = delta U + D dv
  __device__ __forceinline__ void store_dx(const Result (&U)[4], int head, int channel) const {
    const float* const D = s.D ? s.D + head * s.D_width : nullptr;
    const bool each = s.D_width > 1;
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const float delta = step(kDelta, row(r)) * token_unit();
      const int64_t at = m.where.chunk.row * s.dx.stride[0] + (m.where.chunk.begin + row(r)) * s.dx.stride[1] + head * s.dx.stride[2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int c = column(n / 2, n % 2 * 4);
        const int left = int(s.width) - channel - c;
        const float2 dv = Policy::pair(&m.dv[row(r)][c]);
        Vec<2> dx = {{delta * U[n / 2][n % 2][r], delta * U[n / 2][n % 2][r + 1]}};
        if (D) {
          dx[0] = fmaf(left > 0 ? D[each ? channel + c : 0] * m.unit_dv : 0.f, dv.x, dx[0]);
          dx[1] = fmaf(left > 1 ? D[each ? channel + c + 1 : 0] * m.unit_dv : 0.f, dv.y, dx[1]);
        }
        if (row(r) < m.where.chunk.count) store_vec<2>(s.dx, at + channel + c, dx, p.wide_dx, left);
      }
    }
  }
  // dD of this warp's tokens.
  __device__ __forceinline__ void store_skip(int head, int channel) const {
    float* const to = p.skips + ((4 * m.where.index + tile) * s.heads + head) * s.D_width;
    float all = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int c = column(n / 2, n % 2 * 4);
      float both[2] = {0.f, 0.f};
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float2 x = Policy::pair(&m.x[row(r)][c]), dv = Policy::pair(&m.dv[row(r)][c]);
        both[0] = fmaf(x.x, dv.x, both[0]), both[1] = fmaf(x.y, dv.y, both[1]);
      }
      both[0] *= m.unit_x * m.unit_dv, both[1] *= m.unit_x * m.unit_dv;
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

  // The rows of this warp's tokens. Full has too many registers of them to keep.
  struct Rows {
    A a[Policy::kScaled ? 4 : 1];
    const Local& at;
    const T (&from)[kChunk][kRow];
    __device__ __forceinline__ Rows(const Local& at, const T (&from)[kChunk][kRow]) : at(at), from(from) {
      if constexpr (Policy::kScaled) {
#pragma unroll
        for (int k = 0; k < 4; ++k) a[k] = load(k);
      }
    }
    __device__ __forceinline__ A load(int k) const {
      return Policy::template load_a<false>(Tile{&from[16 * at.tile][16 * k], kRow}, at.lane);
    }
    __device__ __forceinline__ A operator[](int k) const {
      if constexpr (Policy::kScaled) return a[k];
      else return load(k);
    }
  };

  // E of this head, and of what its products with the scores have between j and i.
  __device__ __forceinline__ void add_E(int head, bool first) {
    const Rows dv(*this, m.dv);
    float* const to = p.parts_of(s, m.where.index, head) + (kBetween + tile) * kChunk;
    float ahead[2] = {0.f, 0.f};   // of each row, the sum over all tiles before
#pragma unroll
    for (int jt = 0; jt < 4; ++jt) {
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
      if (jt <= tile) {
        __syncwarp();
        Result e = {}, W, between_j;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Policy::multiply(e, dv[k], Policy::template load_b<true>(Tile{&m.x[16 * jt][16 * k], kRow}, lane));
        }
        Policy::template load_result<true>(W, Tile{&m.scores[16 * jt][16 * tile], kRow}, lane);
        float columns[4], rows[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; ++i) columns[i] = m.unit_x * m.unit_dv * step(kDelta, column(jt, i / 2 * 4 + i % 2));
        if (jt == tile) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int from = column(jt, i), end = row(i % 4);
            e[i / 4][i % 4] = from <= end ? e[i / 4][i % 4] * between(end, from) * columns[i / 4 * 2 + i % 2] : 0.f;
            W[i / 4][i % 4] = from <= end ? W[i / 4][i % 4] : 0.f;
          }
        } else {
          const float inside[2] = {m.inside[row(0)], m.inside[row(2)]};
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[i] *= between(16 * tile, column(jt, i / 2 * 4 + i % 2));
#pragma unroll
          for (int i = 0; i < 8; ++i) e[i / 4][i % 4] *= inside[i % 4 / 2] * columns[i / 4 * 2 + i % 2];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          E[jt][i / 4][i % 4] += e[i / 4][i % 4];
          W[i / 4][i % 4] *= e[i / 4][i % 4];
          rows[i % 4 / 2] += W[i / 4][i % 4];
          between_j[i / 4][i % 4] = ahead[i % 4 / 2];
        }
        Exact::multiply(between_j, Exact::computed(W), Exact::ones_above(lane));
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
        if (lane < 4) add(to + 16 * jt + i / 2 * 8 + lane * 2 + i % 2, m.unit_B * m.unit_C * scale(p.less) * sums[i], first);
      }
    }
  }

  // dB += exp(L[Q] - L) delta G^T x
  __device__ __forceinline__ void add_dB(float unit_G) {
    const float unit = m.unit_x * unit_G;
    const Rows x(*this, m.x);
    const float weight[2] = {unit * to_end(row(0)) * step(kDelta, row(0)), unit * to_end(row(2)) * step(kDelta, row(2))};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      __syncwarp();
      Result d = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Policy::multiply(d, x[k], Policy::template load_b<false>(Tile{&m.G[16 * k][16 * n], kState<Policy>}, lane));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[n][i / 4][i % 4] = fmaf(weight[i % 4 / 2], d[i / 4][i % 4], sum[n][i / 4][i % 4]);
    }
  }
  // dC += exp(L) S^T dv, and <dv, S C>, <G, S>.
  __device__ __forceinline__ void add_dC(int head, float unit_S, float unit_G, bool first) {
    const Rows dv(*this, m.dv);
    const float unit = m.unit_dv * unit_S, weight[2] = {unit * from_begin(row(0)), unit * from_begin(row(2))};
    float dots[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      __syncwarp();
      Result d = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Policy::multiply(d, dv[k], Policy::template load_b<false>(Tile{&m.S[16 * k][16 * n], kState<Policy>}, lane));
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
    dots[0] *= unit * m.unit_C, dots[1] *= unit * m.unit_C;
    add_rows(dots, head, kSCv, first);
    Result product = {};   // its diagonal is what is wanted
#pragma unroll 1
    for (int k = 0; k < kColumns<Policy>; k += 16) {
      const A a = Policy::template load_a<false>(Tile{&m.S[16 * tile][k], kState<Policy>}, lane);
      Policy::multiply(product, a, Policy::template load_b<true>(Tile{&m.G[16 * tile][k], kState<Policy>}, lane));
    }
    float inner = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column(tile, i) == row(i % 4)) inner += product[i / 4][i % 4];
    }
    for (int d = 1; d < 32; d *= 2) inner += __shfl_xor_sync(~0u, inner, d);
    if (lane == 0) add(p.inner + (m.where.index * s.heads + head) * 4 + tile, unit_S * unit_G * inner, first);
  }

  // dB += E^T C or dC += E B, over all heads; then the slabs.
  __device__ __forceinline__ void store_shared(int n) {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) most = fmaxf(most, ends ? fabsf(E[i / 8][i / 4 % 2][i % 4]) : 0.f);
    for (int d = 1; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
    __syncthreads();   // S and G have been read
    if (lane == 0) m.most[0][threadIdx.x / 32] = most;
    if (ends) {
#pragma unroll
      for (int jt = 0; jt < 4; ++jt)
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          *reinterpret_cast<float2*>(&m.E[row(i % 4)][column(jt, i)]) = {E[jt][i / 4][i % 4], E[jt][i / 4][i % 4 + 1]};
        }
    }
    __syncthreads();
    const float unit_E = Policy::kScaled ? common_unit(m.most[0]) : 1.f, unit = unit_E * (ends ? m.unit_B : m.unit_C);
    const auto* const from = ends ? m.B : m.C;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      Result d = {};
#pragma unroll 1
      for (int k = ends ? 0 : tile; k < (ends ? tile + 1 : 4); ++k) {
        const Matrix<const float> E{ends ? &m.E[16 * tile][16 * k] : &m.E[16 * k][16 * tile], kChunk + 4};
        const A a = ends ? Policy::template load_computed<false>(E, scale(unit_E), lane)
                         : Policy::template load_computed<true>(E, scale(unit_E), lane);
        Policy::multiply(d, a, Policy::template load_b<false>(Tile{&from[16 * k][16 * i], kState<Policy>}, lane));
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[i][k / 4][k % 4] = fmaf(unit, d[k / 4][k % 4], sum[i][k / 4][k % 4]);
    }
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      if (row(r) >= m.where.chunk.count) continue;
      float* const to = p.slab_of(s, m.where.block, m.where.chunk.row, m.where.chunk.begin + row(r), m.where.group) + (ends ? p.states : 0) + n;
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
