// One token of the recurrence on a tile of the state, in float32: what the step and the sequential form share, which
// makes them agree bit for bit.
#pragma once
#include "cuda/math.cuh"
#include "cuda/reduce.cuh"
#include "cuda/state_tile.cuh"
#include "gated_delta_rule/kernel.h"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int64_t kLongest = 1 << 30;   // places along an axis are int, offsets into memory int64_t

// exp(g); NaN where g is not <= 0.
__device__ __forceinline__ float decay_of(float g) { return g <= 0.f ? ex2(g * kLog2e) : not_a_number(); }

// Advances the tile. v are its 4 columns; q(f), k(f), w(f) are keys 4 f to 4 f + 3 of the thread, as they are needed: w
// the decays. Returns S'^T q, summed over the thread's keys.
template <int L, int F, class Row, class Decay>
__device__ __forceinline__ Vec<4> advance(StateTile<F>& S, const Vec<4>& v, float beta, const Row& q, const Row& k,
                                          const Decay& w) {
  Vec<4> u{}, y{};
#pragma unroll
  for (int f = 0; f < F; ++f) {
    const Vec<4> k4 = k(f), w4 = w(f);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 4, c = i % 4;
      float& x = S.v[4 * f + key][c];
      x *= w4[key];
      u[c] = f + key ? fmaf(x, k4[key], u[c]) : x * k4[0];
    }
  }
  all_over_lanes<L>(u);
#pragma unroll
  for (int c = 0; c < 4; ++c) u[c] = beta * (v[c] - u[c]);
#pragma unroll
  for (int f = 0; f < F; ++f) {
    const Vec<4> k4 = k(f), q4 = q(f);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 4, c = i % 4;
      float& x = S.v[4 * f + key][c];
      x = fmaf(k4[key], u[c], x);
      y[c] = f + key ? fmaf(x, q4[key], y[c]) : x * q4[0];
    }
  }
  return y;
}

}  // namespace
}  // namespace pyseq
