// With x_hat = v r and q = e w, where e is the gradient at w x_hat (dy, times silu(z) where the norm came first):
//   dw = sum e x_hat     dv = r (q - x_hat mean(q x_hat))
//   gate first: ds = dv silu(z), dz = dv s silu'(z)     norm first: ds = dv, dz = dy w x_hat silu'(z)
// Three launches: the data gradients, one block per (row, group); the sums of e x_hat over each block of rows, a thread
// per channel; the sum of those over the blocks, in order. No atomics: the same bits every run.
#include "cuda/device.cuh"
#include "cuda/reduce.cuh"
#include "rms_norm_gated/kernel.h"
#include "rms_norm_gated/update.cuh"

namespace pyseq {
namespace {

__global__ void __launch_bounds__(kNormThreads) rms_norm_gated_data_kernel(RmsNormGatedBackward a) {
  const int64_t groups = a.dim / a.group;
  const bool gate_first = a.z && !a.norm_before_gate, gate_last = a.z && a.norm_before_gate;
  for (int64_t unit = blockIdx.x; unit < a.rows * groups; unit += gridDim.x) {
    const int64_t row = unit / groups, first = unit % groups * a.group, last = first + a.group;
    const int64_t dy = a.offset(a.dy, row), s = a.offset(a.s, row), z = a.offset(a.z, row);
    const int64_t dx = a.offset(a.dx, row), dz = a.offset(a.dz, row);
    const int64_t dsum = a.offset(a.dsum, row), dresidual = a.offset(a.dresidual, row);
    const float r = a.rstd[unit];
    float dot = 0.f;
    for (int64_t d = first + threadIdx.x; d < last; d += kNormThreads) {
      const float gate = a.z ? silu(load(a.z, z + d)) : 1.f;
      float x_hat = load(a.s, s + d) * r, e = load(a.dy, dy + d);
      if (gate_first) x_hat *= gate;
      if (gate_last) e *= gate;
      dot += e * x_hat * a.weight[d];
    }
    const float mean = block_sum<kNormThreads>(dot) / float(a.group);
    for (int64_t d = first + threadIdx.x; d < last; d += kNormThreads) {
      const float w = a.weight[d], sv = load(a.s, s + d), zv = a.z ? load(a.z, z + d) : 0.f;
      const float gate = a.z ? silu(zv) : 1.f, dyv = load(a.dy, dy + d);
      const float x_hat = gate_first ? sv * r * gate : sv * r;
      const float q = gate_last ? dyv * gate * w : dyv * w;
      const float dv = (q - x_hat * mean) * r;
      if (a.dz) store(a.dz, dz + d, (gate_first ? dv * sv : dyv * w * x_hat) * silu_grad(zv));
      float ds = gate_first ? dv * gate : dv;
      if (a.dsum) ds += load(a.dsum, dsum + d);
      store(a.dx, dx + d, ds);
      if (a.dresidual) store(a.dresidual, dresidual + d, ds);
    }
  }
}

__global__ void __launch_bounds__(kNormThreads) rms_norm_gated_weight_kernel(RmsNormGatedBackward a) {
  const int64_t d = int64_t(blockIdx.x) * kNormThreads + threadIdx.x, block = blockIdx.y;
  if (d >= a.dim) return;
  const int64_t groups = a.dim / a.group, end = (block + 1) * a.rows_per_block;
  float total = 0.f;
  for (int64_t row = block * a.rows_per_block; row < (end < a.rows ? end : a.rows); ++row) {
    const float gate = a.z ? silu(load(a.z, a.offset(a.z, row) + d)) : 1.f;   // on either side of the norm it enters e x_hat
    total += load(a.dy, a.offset(a.dy, row) + d) * load(a.s, a.offset(a.s, row) + d) * a.rstd[row * groups + d / a.group] * gate;
  }
  a.partial[block * a.dim + d] = total;
}

__global__ void __launch_bounds__(kNormThreads) rms_norm_gated_total_kernel(RmsNormGatedBackward a, int64_t blocks) {
  const int64_t d = int64_t(blockIdx.x) * kNormThreads + threadIdx.x;
  if (d >= a.dim) return;
  float total = 0.f;
  for (int64_t block = 0; block < blocks; ++block) total += a.partial[block * a.dim + d];
  a.dweight[d] = total;
}

}  // namespace

int rms_norm_gated_backward_cuda(const RmsNormGatedBackward& a, void* stream) {
  const dim3 threads(kNormThreads);
  const unsigned tiles = unsigned((a.dim + kNormThreads - 1) / kNormThreads);
  const int64_t blocks = (a.rows + a.rows_per_block - 1) / a.rows_per_block;
  const dim3 grid = norm_grid(a.rows * (a.dim / a.group));
  if (int error = launch<rms_norm_gated_data_kernel>(grid, threads, 0, stream, a)) return error;
  if (blocks > 0) {
    if (int error = launch<rms_norm_gated_weight_kernel>(dim3(tiles, unsigned(blocks)), threads, 0, stream, a)) return error;
  }
  return launch<rms_norm_gated_total_kernel>(dim3(tiles), threads, 0, stream, a, blocks);
}

}  // namespace pyseq
