// The state of the fused form, in the registers of a warp.
#pragma once
#include "ssd/chunk_tile.cuh"

namespace pyseq {
namespace {

constexpr int kParts = 3;   // numbers of bfloat16 that w x is the sum of: 24 bits

// The tile of S: p = 16 i + g + 8 (r / 2) and n = 8 j + 2 t + r % 2 in v[i][j][r].
template <int N> struct State {
  float v[2][N / 8][4];
};

// f(i, j, pair, offset in [P, N]) for each pair of states that there is.
template <int N, class F> __device__ __forceinline__ void for_pairs(const Chunk<N>& c, const F& f) {
  const int rows = c.at().rows - c.g, states = int(c.s.states);
  const int64_t begin = int64_t(c.at().first) * states + unsigned(c.g * states + 2 * c.t);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        if (16 * i + 8 * pair < rows && 8 * j < states) f(i, j, 2 * pair, begin + (16 * i + 8 * pair) * states + 8 * j);
}
template <int N>
__device__ __forceinline__ void load_state(State<N>& S, const float* from, const Chunk<N>& c, float otherwise) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) S.v[i][j][r] = from ? 0.f : otherwise;
  if (!from) return;
  for_pairs(c, [&](int i, int j, int r, int64_t offset) {
    const Vec<2> x = load_vec<2>(from + offset);
    S.v[i][j][r] = x[0], S.v[i][j][r + 1] = x[1];
  });
}
template <int N> __device__ __forceinline__ void store_state(float* to, const State<N>& S, const Chunk<N>& c) {
  for_pairs(c, [&](int i, int j, int r, int64_t offset) {
    store_vec<2>(to + offset, Vec<2>{S.v[i][j][r], S.v[i][j][r + 1]});
  });
}

// w x of 16 tokens and the rows of the tile, transposed, as operand A: as many numbers of bfloat16.
template <int N>
__device__ __forceinline__ void weigh(unsigned (&wx)[2][kParts][4], const Chunk<N>& c, int stage, int q) {
  Vec<2> w[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) w[half] = load_vec<2>(c.steps().column + 16 * q + 8 * half + 2 * c.t);
  const float after = c.between(kQ / 16 - 1, q);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    unsigned x[4];
    c.x(stage).template load<true>(x, q, 2 * i, c.lane);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int to = r == 1 ? 2 : r == 2 ? 1 : r;   // A has its second 8 rows, here of S, before its second 8 columns
      float low = low_half(x[r]) * (after * w[r % 2][0]), high = high_half(x[r]) * (after * w[r % 2][1]);
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        wx[i][k][to] = pack(low, high);
        low -= low_half(wx[i][k][to]), high -= high_half(wx[i][k][to]);
      }
    }
  }
}

// S = exp(L[Q]) S + sum of w x B^T. What 16 tokens add is summed up apart: tensor cores cut off digits of a sum, and
// those of S are needed.
template <int N>
__device__ __forceinline__ void advance(State<N>& S, const Chunk<N>& c, int stage) {
  float decay = c.between(kQ / 16 - 1, -1);
#pragma unroll 1
  for (int q = 0; q < kQ / 16; ++q, decay = 1.f) {
    unsigned wx[2][kParts][4];
    weigh(wx, c, stage, q);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      if (j == N / 32) __syncwarp();   // not all of B is brought in at once: there are no registers for it
      unsigned b[4];
      c.B(stage).template load<true>(b, q, 2 * j, c.lane);
      float more[2][2][4] = {};
#pragma unroll
      for (int k = kParts - 1; k >= 0; --k)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) mma<__nv_bfloat16>(more[i][e], wx[i][k], {b[2 * e], b[2 * e + 1]});
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int r = 0; r < 4; ++r) S.v[i][2 * j + e][r] = fmaf(decay, S.v[i][2 * j + e][r], more[i][e][r]);
    }
  }
}

}  // namespace
}  // namespace pyseq
