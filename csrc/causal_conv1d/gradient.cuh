// What both backward kernels share, and the samples whose gradients a run does not write.
#pragma once
#include "causal_conv1d/update.cuh"

namespace pyseq {
namespace {

// dx of W-1 samples at one end of a sequence, one channel a thread: of those before its first token (dstate), or of its
// last. The W-1 tokens at that end give all the e that takes; what they read is loaded before any of it is used.
template <class E, int width, bool start>
__device__ __forceinline__ void edge(const CausalConv1dBackward& g, const Sequence& s, const Taps<1, width>& taps,
                                     int64_t d) {
  const CausalConv1d& c = g.forward;
  constexpr int before = width - 1;
  const int64_t first = start ? 0 : s.T - before;   // of the tokens
  Vec<1> x[2 * before];
  float e[before];
#pragma unroll
  for (int i = 0; i < 2 * before; ++i) {
    const int64_t t = first - before + i;
    x[i][0] = t >= 0 && t < s.T ? load(row<const E>(c.x, s, t, d)) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < before; ++i) {
    const int64_t t = first + i;
    e[i] = t >= 0 && t < s.T ? load(row<const E>(g.dy, s, t, d)) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < 2 * before; ++i) {
    const int64_t t = first - before + i;
    if (t < 0 && t >= -before) x[i] = sample<E, 1>(c, s, t, d);
  }
  if (c.silu) {
#pragma unroll
    for (int i = 0; i < before; ++i) e[i] *= silu_grad(convolve<1, width>(taps, x + i)[0]);
  }
#pragma unroll
  for (int i = 0; i < before; ++i) {
    const int64_t j = start ? i - before : first + i;
    float dx = 0.f;
#pragma unroll
    for (int k = 0; k < width; ++k) {   // newest e first
      const int token = start ? i - k : i + before - k;
      const bool exists = first + token >= 0 && first + token < s.T;
      if (token >= 0 && token < before && exists) dx = fmaf(taps.weight[k][0], e[token], dx);
    }
    if (!start && j < 0) continue;
    if (g.dnew_state && j >= s.T - before) dx += g.dnew_state[s.in_state(c, j - s.T, d)];
    if (start) g.dstate[s.in_state(c, j, d)] = dx;
    else store(row<E>(g.dx, s, j, d), dx);
  }
}

// Both ends: dstate, and dx of the last W-1 samples, which dnew_state adds to.
template <class E, int width> __device__ __forceinline__ void edges(const CausalConv1dBackward& g, const Unit& u) {
  const CausalConv1d& c = g.forward;
  if (u.d >= c.D) return;
  if (invalid(c)) {
    for (int k = 1 - width; g.dstate && k < 0; ++k) g.dstate[Sequence{u.index, 0, 0, 0}.in_state(c, k, u.d)] = NAN;
    return;
  }
  const Sequence s = sequence(c, u.index);
  const Taps<1, width> taps = taps_of<1, width>(c, u.d);
  edge<E, width, false>(g, s, taps, u.d);
  if (g.dstate) edge<E, width, true>(g, s, taps, u.d);
}

template <int n, auto kernel> int launch_runs(const CausalConv1dBackward& g, void* stream) {
  const CausalConv1d& c = g.forward;
  const int64_t warps = c.S * warps_across<1>(c.D) + c.runs * warps_across<n>(c.D);
  return warps ? launch<kernel>(conv_grid(warps), dim3(kConvThreads), 0, stream, g) : 0;
}

}  // namespace

int causal_conv1d_backward_wide_cuda(const CausalConv1dBackward&, void* stream);

}  // namespace pyseq
