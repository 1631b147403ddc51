// What both backward kernels share: e of one token, and the samples whose gradients a run does not write.
#pragma once
#include "causal_conv1d/update.cuh"

namespace pyseq {
namespace {

template <class E>
__device__ __forceinline__ float e_at(const CausalConv1dBackward& g, const Sequence& s, int64_t t, int64_t d) {
  const CausalConv1d& c = g.forward;
  const float dy = load(row<const E>(g.dy, s, t, d));
  return c.silu ? dy * silu_grad(convolve_any<E>(c, s, t, d)) : dy;
}

// dx of sample j, newest e first. stored: e lies in memory; else it is computed again.
template <class E, bool stored>
__device__ __forceinline__ float dx_at(const CausalConv1dBackward& g, const Sequence& s, int64_t j, int64_t d) {
  const CausalConv1d& c = g.forward;
  const int64_t newest = j + c.W - 1;   // the last token that sees sample j
  float dx = 0.f;
  for (int64_t k = max(newest - s.T + 1, int64_t(0)); k < c.W && k <= newest; ++k) {
    const int64_t t = newest - k;
    const float e = stored ? g.e[(s.batch * c.T + s.first + t) * c.D + d] : e_at<E>(g, s, t, d);
    dx = fmaf(c.weight[d * c.W + k], e, dx);
  }
  return dx;
}

// The two ends of a sequence, one channel a thread: dstate, and dx of the last W-1 samples, which dnew_state adds to.
template <class E, bool stored> __device__ __forceinline__ void edges(const CausalConv1dBackward& g, const Unit& u) {
  const CausalConv1d& c = g.forward;
  if (u.index >= c.S || u.d >= c.D) return;
  const bool unknown = invalid(c);
  const Sequence s = unknown ? Sequence{u.index, 0, 0, 0} : sequence(c, u.index);
  const int64_t before = c.W - 1;
#pragma unroll 1
  for (int64_t i = 0; i < 2 * before; ++i) {   // before the first token, then among the last
    const int64_t j = i < before ? i - before : s.T - 2 * before + i;
    if (j < 0 && (i >= before || !g.dstate)) continue;
    float dx = unknown ? NAN : dx_at<E, stored>(g, s, j, u.d);
    if (g.dnew_state && j >= s.T - before) dx += g.dnew_state[s.in_state(c, j - s.T, u.d)];
    if (j >= 0) store(row<E>(g.dx, s, j, u.d), dx);
    else g.dstate[s.in_state(c, j, u.d)] = dx;
  }
}

template <int n, auto kernel> int launch_runs(const CausalConv1dBackward& g, void* stream) {
  const CausalConv1d& c = g.forward;
  const int64_t warps = c.runs * warps_across<n>(c.D) + c.S * warps_across<1>(c.D);
  return warps ? launch<kernel>(conv_grid(warps), dim3(kConvThreads), 0, stream, g) : 0;
}

}  // namespace

int causal_conv1d_backward_wide_cuda(const CausalConv1dBackward&, void* stream);

}  // namespace pyseq
