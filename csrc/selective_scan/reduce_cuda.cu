// The second half of the backward: sums of what its blocks, rows and segments left, in a fixed order.
#include "selective_scan/backward.cuh"

namespace pyseq {
namespace {

constexpr int kReduceThreads = 256;

// Four states of dB or dC of one token and group per thread, in the order in which the slabs lie.
__global__ void __launch_bounds__(kReduceThreads) selective_scan_reduce_tokens_kernel(SelectiveScan s, Workspace w) {
  const int64_t width = w.width(), quads = width / 4, slab = s.time * 2 * width;
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= s.batch * s.groups * s.time * 2 * quads) return;
  const int64_t n = i % quads * 4, kind = i / quads % 2, t = i / quads / 2 % s.time, unit = i / quads / 2 / s.time;
  const float* from = w.slabs + unit * w.blocks * slab + (t * 2 + kind) * width + n;
  Vec<4> sum{};
  for (int64_t block = 0; block < w.blocks; ++block) {
    const Vec<4> x = load_vec<4>(from + block * slab);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += x[k];
  }
  const View& to = kind ? s.dC : s.dB;
  const int64_t offset = unit / s.groups * to.stride[0] + t * to.stride[1] + unit % s.groups * to.stride[2] + n;
  store_vec<4>(to, offset, sum, false, s.states - n);
}

__global__ void __launch_bounds__(kReduceThreads) selective_scan_reduce_channels_kernel(SelectiveScan s, Workspace w) {
  const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t rows = s.batch * w.segments;
  const auto add = [&](float* to, const float* from, int64_t stride) {
    if (!to || i >= stride) return;
    float sum = 0.f;
    for (int64_t row = 0; row < rows; ++row) sum += from[row * stride + i];
    to[i] = sum;
  };
  add(s.dA, w.dA, s.dim * s.states);
  add(s.dD, w.dD, s.dim);
  add(s.dbias, w.dbias, s.dim);
}

dim3 reduce_grid(int64_t items) { return dim3(unsigned((items + kReduceThreads - 1) / kReduceThreads)); }

}  // namespace

int selective_scan_reduce_cuda(const SelectiveScan& s, void* stream) {
  const Workspace w(s);
  const dim3 threads{kReduceThreads};
  const int64_t quads = s.batch * s.groups * s.time * 2 * w.width() / 4, weights = s.dim * s.states;
  if (quads > 0) {
    const dim3 grid = reduce_grid(quads);
    if (int error = launch<selective_scan_reduce_tokens_kernel>(grid, threads, 0, stream, s, w)) return error;
  }
  if (weights == 0) return 0;
  return launch<selective_scan_reduce_channels_kernel>(reduce_grid(weights), threads, 0, stream, s, w);
}

}  // namespace pyseq
