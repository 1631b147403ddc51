// Any width, dtype and alignment, a channel a thread, in two launches: e to memory; dx and the partial sums from it.
#include "causal_conv1d/gradient.cuh"

namespace pyseq {
namespace {

template <class E>
__device__ __forceinline__ float e_at(const CausalConv1dBackward& g, const Sequence& s, int64_t t, int64_t d) {
  const CausalConv1d& c = g.forward;
  const float dy = load(row<const E>(g.dy, s, t, d));
  return c.silu ? dy * silu_grad(convolve_any<E>(c, s, t, d)) : dy;
}

// dx of sample j, newest e first.
__device__ __forceinline__ float dx_at(const CausalConv1dBackward& g, const Sequence& s, int64_t j, int64_t d) {
  const CausalConv1d& c = g.forward;
  const int64_t newest = j + c.W - 1;   // the last token that sees sample j
  float dx = 0.f;
  for (int64_t k = max(newest - s.T + 1, int64_t(0)); k < c.W && k <= newest; ++k) {
    const int64_t t = newest - k;
    dx = fmaf(c.weight[d * c.W + k], g.e[(s.batch * c.T + s.first + t) * c.D + d], dx);
  }
  return dx;
}

// The two ends of a sequence, one channel a thread: dstate, and dx of the last W-1 samples, which dnew_state adds to.
template <class E> __device__ __forceinline__ void edges(const CausalConv1dBackward& g, const Unit& u) {
  const CausalConv1d& c = g.forward;
  if (u.d >= c.D) return;
  const bool unknown = invalid(c);
  const Sequence s = unknown ? Sequence{u.index, 0, 0, 0} : sequence(c, u.index);
  const int64_t before = c.W - 1;
#pragma unroll 1
  for (int64_t i = 0; i < 2 * before; ++i) {   // before the first token, then among the last
    const int64_t j = i < before ? i - before : s.T - 2 * before + i;
    if (j < 0 && (i >= before || !g.dstate)) continue;
    float dx = unknown ? NAN : dx_at(g, s, j, u.d);
    if (g.dnew_state && j >= s.T - before) dx += g.dnew_state[s.in_state(c, j - s.T, u.d)];
    if (j >= 0) store(row<E>(g.dx, s, j, u.d), dx);
    else g.dstate[s.in_state(c, j, u.d)] = dx;
  }
}

template <class E>
__global__ void __launch_bounds__(kConvThreads, 8) causal_conv1d_e_kernel(CausalConv1dBackward g) {
  const CausalConv1d& c = g.forward;
  const Unit u = unit_of<1>(warp_of_grid(), c.D);
  if (u.index >= c.runs || u.d >= c.D || invalid(c)) return;
  each_piece(c, run_at(c, u.index), [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) g.e[(s.batch * c.T + s.first + t) * c.D + u.d] = e_at<E>(g, s, t, u.d);
  });
}

template <class E>
__global__ void __launch_bounds__(kConvThreads, 8) causal_conv1d_backward_wide_kernel(CausalConv1dBackward g) {
  const CausalConv1d& c = g.forward;
  const int64_t warp = warp_of_grid(), ends = c.S * warps_across<1>(c.D);
  if (warp < ends) return edges<E>(g, unit_of<1>(warp, c.D));
  const Unit u = unit_of<1>(warp - ends, c.D);
  if (u.index >= c.runs || u.d >= c.D) return;
  const Run run = run_at(c, u.index);
  if (invalid(c)) return fill_nan<E, 1>(g.dx, run, u.d);
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    const int64_t stop = min(end, s.T - (c.W - 1));
    for (int64_t j = begin; j < stop; ++j) store(row<E>(g.dx, s, j, u.d), dx_at(g, s, j, u.d));
  });
  for (int64_t k = 0; k <= c.W; ++k) {
    float sum = 0.f;
    each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float e = g.e[(s.batch * c.T + s.first + t) * c.D + u.d];
        sum = k == c.W ? sum + e : fmaf(e, sample<E, 1>(c, s, t - (c.W - 1) + k, u.d)[0], sum);
      }
    });
    g.partial[(u.index * (c.W + 1) + k) * c.D + u.d] = sum;
  }
}

template <class E> int launch_both(const CausalConv1dBackward& g, void* stream) {
  const int64_t warps = g.forward.runs * warps_across<1>(g.forward.D);
  if (warps) {
    const int error = launch<causal_conv1d_e_kernel<E>>(conv_grid(warps), dim3(kConvThreads), 0, stream, g);
    if (error) return error;
  }
  return launch_runs<1, causal_conv1d_backward_wide_kernel<E>>(g, stream);
}

}  // namespace

int causal_conv1d_backward_wide_cuda(const CausalConv1dBackward& g, void* stream) {
  switch (g.forward.x.type) {
    case DType::bf16: return launch_both<__nv_bfloat16>(g, stream);
    case DType::f16: return launch_both<__half>(g, stream);
    default: return launch_both<float>(g, stream);
  }
}

}  // namespace pyseq
