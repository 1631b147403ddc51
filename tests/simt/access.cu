// One warp reads memory in a pattern: lane i takes `width` floats from i * stride + shift on, and writes their sum.
#include <cstdint>

#include "cuda/async.cuh"
#include "cuda/vector.cuh"

namespace pyseq {
namespace {

template <int width> __device__ __forceinline__ float sum_of(const float* p) {
  const Vec<width> v = load_vec<width>(p);
  float sum = 0.f;
  for (int i = 0; i < width; ++i) sum += v[i];
  return sum;
}

template <int width> __global__ void read_global_kernel(const float* x, float* y, int stride, int shift) {
  y[threadIdx.x] = sum_of<width>(x + threadIdx.x * stride + shift);
}

template <int width> __global__ void read_shared_kernel(const float* x, float* y, int stride, int shift) {
  float* const tile = dynamic_smem<float>();
  for (int i = 0; i < 32 * stride + width + shift; i += 4) {   // one lane, nothing else: does not count as a conflict
    if (threadIdx.x == 0) cp_async<16>(tile + i, x + i);
  }
  cp_async_wait_all();
  __syncwarp();
  y[threadIdx.x] = sum_of<width>(tile + threadIdx.x * stride + shift);
}

// Lane i reads its row of `time` elements, or column: the same loop, with lanes that leave it at different times.
__global__ void ragged_rows_kernel(const float* x, float* y, int time, int by_column) {
  const int lane = threadIdx.x, n = time - lane % 2;
  float sum = 0.f;
  for (int t = 0; t < n; ++t) sum += by_column ? x[t * 32 + lane] : x[lane * time + t];
  y[lane] = sum;
}

template <int width> int read_pattern(const float* x, float* y, int shared, int stride, int shift) {
  const size_t bytes = 4 * (32 * stride + 2 * width + shift + 4);
  return shared ? launch<read_shared_kernel<width>>(1, 32, bytes, nullptr, x, y, stride, shift)
                : launch<read_global_kernel<width>>(1, 32, 0, nullptr, x, y, stride, shift);
}

}  // namespace
}  // namespace pyseq

#pragma GCC visibility push(default)
extern "C" {
int read_pattern(const float* x, float* y, int width, int shared, int stride, int shift) {
  if (width == 1) return pyseq::read_pattern<1>(x, y, shared, stride, shift);
  if (width == 2) return pyseq::read_pattern<2>(x, y, shared, stride, shift);
  return pyseq::read_pattern<4>(x, y, shared, stride, shift);
}
int ragged_rows(const float* x, float* y, int time, int by_column) {
  return pyseq::launch<pyseq::ragged_rows_kernel>(1, 32, 0, nullptr, x, y, time, by_column);
}
}
#pragma GCC visibility pop
