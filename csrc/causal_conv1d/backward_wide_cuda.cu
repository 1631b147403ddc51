// Any width, dtype and alignment, a channel a thread, in two launches: e to memory; dx and the partial sums from it.
#include "causal_conv1d/gradient.cuh"

namespace pyseq {
namespace {

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
  const int64_t warp = warp_of_grid(), runs = c.runs * warps_across<1>(c.D);
  if (warp >= runs) return edges<E, true>(g, unit_of<1>(warp - runs, c.D));
  const Unit u = unit_of<1>(warp, c.D);
  if (u.d >= c.D) return;
  const Run run = run_at(c, u.index);
  if (invalid(c)) return fill_nan<E, 1>(g.dx, run, u.d);
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    const int64_t stop = min(end, s.T - (c.W - 1));
    for (int64_t j = begin; j < stop; ++j) store(row<E>(g.dx, s, j, u.d), dx_at<E, true>(g, s, j, u.d));
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
