// One block normalises one group of one row; the grid walks over (row, group) pairs.
#include "cuda/device.cuh"
#include "cuda/reduce.cuh"
#include "rms_norm_gated/kernel.h"
#include "rms_norm_gated/update.cuh"

namespace pyseq {
namespace {

__global__ void __launch_bounds__(kNormThreads) rms_norm_gated_kernel(RmsNormGated a) {
  const int64_t groups = a.dim / a.group;
  for (int64_t unit = blockIdx.x; unit < a.rows * groups; unit += gridDim.x) {
    const int64_t row = unit / groups, first = unit % groups * a.group, last = first + a.group;
    const int64_t x = a.offset(a.x, row), z = a.offset(a.z, row);
    const int64_t residual = a.offset(a.residual, row), y = a.offset(a.y, row);
    float* sum_row = a.sum ? a.sum + row * a.dim : nullptr;
    float squares = 0.f;
    for (int64_t d = first + threadIdx.x; d < last; d += kNormThreads) {
      float v = load(a.x, x + d);
      if (sum_row) sum_row[d] = v += load(a.residual, residual + d);
      if (a.z && !a.norm_before_gate) v *= silu(load(a.z, z + d));
      squares += v * v;
    }
    const float r = rsqrtf(block_sum<kNormThreads>(squares) / float(a.group) + a.eps);
    if (threadIdx.x == 0) a.rstd[unit] = r;
    for (int64_t d = first + threadIdx.x; d < last; d += kNormThreads) {
      float v = sum_row ? sum_row[d] : load(a.x, x + d);   // each thread reads back what it wrote itself
      if (a.z) v *= silu(load(a.z, z + d));
      store(a.y, y + d, v * r * a.weight[d]);
    }
  }
}

}  // namespace

int rms_norm_gated_cuda(const RmsNormGated& a, void* stream) {
  return launch<rms_norm_gated_kernel>(norm_grid(a.rows * (a.dim / a.group)), dim3(kNormThreads), 0, stream, a);
}

}  // namespace pyseq
