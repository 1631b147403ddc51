// y of 32 tokens of a chunk: from the state before the chunk, from its tokens, skip and gate.
#pragma once
#include "ssd/chunk_state.cuh"

namespace pyseq {
namespace {

// Tokens 32 h + 16 m + g + 8 (r / 2) and rows 8 j + 2 t + r % 2 of the tile in v[m][j][r].
struct Output {
  float v[2][4][4];
};
struct Gate {
  unsigned v[2][2][4];   // of the two tokens of m, 8 neighbouring rows: 8 t, ...
};

// S as mma accumulates it is S^T as mma takes it, in tf32: columns 2 t and 2 t + 1 of 8 are the ones that it takes as
// columns t and t + 4, of C as of S.
template <int N>
__device__ __forceinline__ void from_state(Output& y, const State<N>& S, const Chunk<N>& c, int h) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    unsigned rows[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) c.C().template load<false>(rows[m], 2 * h + m, 2 * k, c.lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        a[m][0] = low_word(rows[m][2 * e]), a[m][1] = low_word(rows[m][2 * e + 1]);
        a[m][2] = high_word(rows[m][2 * e]), a[m][3] = high_word(rows[m][2 * e + 1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const state = S.v[j / 2][2 * k + e] + j % 2 * 2;
        const unsigned b[2] = {__float_as_uint(state[0]), __float_as_uint(state[1])};
#pragma unroll
        for (int m = 0; m < 2; ++m) mma_tf32(y.v[m][j], a[m], b);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const float before = c.between(2 * h + m - 1, -1);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float in = before * c.steps().row[32 * h + 16 * m + c.g + r / 2 * 8];
#pragma unroll
      for (int j = 0; j < 4; ++j) y.v[m][j][r] *= in;
    }
  }
}

// Scores of 16 x 16 tokens times exp(L[i] - L[j]) delta[j], as operand A in tf32: from the order of the lane's elements
// of mma's sum to that of its operand A, where a pair of columns is t and t + 4.
__device__ __forceinline__ void operand(unsigned (&a)[4], const Vec<4>& sum) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = __float_as_uint(sum[r % 2 * 2 + r / 2]);
}
template <int N> __device__ __forceinline__ void below(unsigned (&a)[2][4], const Chunk<N>& c, int i, int j) {
  const float between = c.between(i - 1, j);
  float row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) row[r] = between * c.steps().row[16 * i + c.g + 8 * r];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec<4> score = load_vec<4>(c.score(i * (i + 1) / 2 + j, half));
    const Vec<2> column = load_vec<2>(c.steps().column + 16 * j + 8 * half + 2 * c.t);
#pragma unroll
    for (int r = 0; r < 4; ++r) score[r] *= column[r % 2] * row[r / 2];
    operand(a[half], score);
  }
}
template <int N> __device__ __forceinline__ void diagonal(unsigned (&a)[2][4], const Chunk<N>& c, int i) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec<4> score = load_vec<4>(c.score(i * (i + 1) / 2 + i, half));
    const int first = 16 * i + 8 * half + 2 * c.t;
    const Vec<2> high = load_vec<2>(c.steps().high + first), low = load_vec<2>(c.steps().low + first);
    const Vec<2> delta = load_vec<2>(c.steps().delta + first);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = c.g + r / 2 * 8, column = 8 * half + 2 * c.t + r % 2;
      const float power = difference(c.L(16 * i + row), {high[r % 2], low[r % 2]});
      const bool later = row >= column;
      score[r] = later ? score[r] * delta[r % 2] * ex2(later ? power : 0.f) : 0.f;
    }
    operand(a[half], score);
  }
}

template <int N> __device__ __forceinline__ void from_tokens(Output& y, const Chunk<N>& c, int h, int stage) {
#pragma unroll 1
  for (int j = 0; j < 2 * h + 2; ++j) {
    unsigned x[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) c.x(stage).template load<true>(x[u], j, 2 * u, c.lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int i = 2 * h + m;
      if (j > i) continue;
      unsigned a[2][4];
      if (j < i) below(a, c, i, j);
      else diagonal(a, c, i);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const unsigned pair = x[p / 2][p % 2 * 2 + half];
          mma_tf32(y.v[m][p], a[half], {low_word(pair), high_word(pair)});
        }
    }
  }
}

template <int N> __device__ __forceinline__ void load_gate(Gate& z, const Chunk<N>& c, int h, int begin, int tokens) {
  const View& from = c.s.z;
  const auto* const p = static_cast<const __nv_bfloat16*>(from.data) + c.of_head(from, begin) + 8 * c.t;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = 32 * h + 16 * m + c.g + 8 * r;
      const bool there = token < tokens && 8 * c.t < c.at().rows;
      const uint4 word = there ? *reinterpret_cast<const uint4*>(p + token * from.stride[1]) : uint4{};
      z.v[m][r][0] = word.x, z.v[m][r][1] = word.y, z.v[m][r][2] = word.z, z.v[m][r][3] = word.w;
    }
}

// Skip, gate, and out. Of bfloat16, 16 bytes at a time, for which neighbouring lanes exchange what they have.
template <int N>
__device__ __forceinline__ void store_rows(Output& y, Gate& z, const Chunk<N>& c, int h, int stage, int begin,
                                           int tokens) {
  const View& to = c.s.y;
  const int64_t first = c.of_head(to, begin);
  const int rows = c.at().rows;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = 32 * h + 16 * m + c.g + 8 * r;
      float* v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = y.v[m][j] + 2 * r;
      if (c.s.D) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned x = *reinterpret_cast<const unsigned*>(c.x(stage).at(token, j) + 4 * c.t);
          const Vec<2> D = load_vec<2>(c.at().D + 8 * j + 2 * c.t);
          v[j][0] = fmaf(D[0], low_half(x), v[j][0]);
          v[j][1] = fmaf(D[1], high_half(x), v[j][1]);
        }
      }
      if (c.s.z) {
        transpose(z.v[m][r], c.lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j][0] *= silu(low_half(z.v[m][r][j]));
          v[j][1] *= silu(high_half(z.v[m][r][j]));
        }
      }
      const int64_t at = first + token * to.stride[1];
      if (to.type == DType::f32) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (token < tokens && 8 * j < rows)
            store_vec<2>(static_cast<float*>(to.data) + at + 8 * j + 2 * c.t, Vec<2>{v[j][0], v[j][1]});
        continue;
      }
      alignas(16) unsigned word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = pack(v[j][0], v[j][1]);
      transpose(word, c.lane);
      if (token < tokens && 8 * c.t < rows)
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(to.data) + at + 8 * c.t) =
            *reinterpret_cast<const uint4*>(word);
    }
}

}  // namespace
}  // namespace pyseq
