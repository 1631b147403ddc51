// One launch, a channel a thread, which shifts its own samples in place. Four samples are read before any is written:
// what is bound by latency must not wait for its loads one after the other.
#include "causal_conv1d/update.cuh"

namespace pyseq {
namespace {

constexpr int kAtOnce = 4;

__global__ void __launch_bounds__(kConvThreads) causal_conv1d_step_kernel(CausalConv1dStep c) {
  const Unit u = unit_of<1>(warp_of_grid(), c.D);
  if (u.index >= c.B || u.d >= c.D) return;
  const int64_t state = u.index * c.state.stride[0] + u.d * c.state.stride[1];
  const float newest = load(c.x, u.index * c.x.stride[0] + u.d);
  float a = c.bias ? c.bias[u.d] : 0.f;
  for (int64_t first = 0; first < c.W; first += kAtOnce) {
    float weight[kAtOnce], window[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t k = first + i;
      weight[i] = k < c.W ? c.weight[u.d * c.W + k] : 0.f;
      window[i] = k < c.W - 1 ? load(c.state, state + k) : newest;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t k = first + i;
      if (k < c.W) a = fmaf(weight[i], window[i], a);
      if (k > 0 && k < c.W) store(c.state, state + k - 1, window[i]);
    }
  }
  store(c.y, u.index * c.y.stride[0] + u.d, c.silu ? silu(a) : a);
}

}  // namespace

int causal_conv1d_step_cuda(const CausalConv1dStep& c, void* stream) {
  const int64_t warps = c.B * warps_across<1>(c.D);
  return warps ? launch<causal_conv1d_step_kernel>(conv_grid(warps), dim3(kConvThreads), 0, stream, c) : 0;
}

}  // namespace pyseq
