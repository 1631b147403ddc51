// One token of some rows of a head's state, in float32. The sequential form and the step share it, which makes them
// agree bit for bit.
#pragma once
#include "cuda/math.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "ssd/kernel.h"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int64_t kLongest = 1 << 30;   // places along an axis are int, offsets into memory int64_t

// A warp holds a tile: 128 / L rows of a head and 4 L F of its states, 4 x 4 F of them in the registers of a thread. L
// neighbouring lanes hold the states of the same rows. More than 256 states are walked in slices of 256.
template <int L> constexpr int kTileRows = 128 / L;
template <int L, int F> constexpr int kTileStates = 4 * L * F;

// f<L, F>() for the tile that N states need.
template <class Function> auto for_states(int64_t N, const Function& f) {
  if (N <= 16) return f.template operator()<4, 1>();
  if (N <= 64) return f.template operator()<8, 2>();
  if (N <= 128) return f.template operator()<8, 4>();
  return f.template operator()<16, 4>();
}

template <int F> struct States {
  float v[4][4 * F];
};

// delta from dt: bias, softplus, limits. NaN stays NaN.
template <class Problem> __device__ __forceinline__ float step_size(const Problem& s, float dt, int head) {
  float delta = s.dt_bias ? dt + s.dt_bias[head] : dt;
  if (s.dt_softplus) delta = softplus(delta);
  delta = delta < s.dt_low ? s.dt_low : delta;
  return delta > s.dt_high ? s.dt_high : delta;
}

// NaN where A is not <= 0.
__device__ __forceinline__ float log_decay(float delta, float A) {
  const float l = delta * A;
  return A <= 0.f ? (l < kLeast ? kLeast : l) : not_a_number();
}

// S = a S + dx B^T and y = S C, as far as the thread has states.
template <bool kOutput, int F>
__device__ __forceinline__ Vec<4> advance(States<F>& S, float a, const Vec<4>& dx, const Vec<4 * F>& B,
                                          const Vec<4 * F>& C) {
  Vec<4> y{};
#pragma unroll
  for (int n = 0; n < 4 * F; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      S.v[r][n] = fmaf(a, S.v[r][n], dx[r] * B[n]);
      if constexpr (kOutput) y[r] = n ? fmaf(S.v[r][n], C[n], y[r]) : S.v[r][n] * C[n];
    }
  }
  return y;
}

}  // namespace
}  // namespace pyseq
