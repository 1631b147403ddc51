// Kernels with one fault each. The comment above each says how the emulator shows it.
#include <cstdint>

#include "cuda/device.cuh"

namespace pyseq {
namespace {

// The second barrier is missing: a warp writes what another has not yet read. Results differ between schedules.
__global__ void __launch_bounds__(128) missing_barrier_kernel(const float* x, float* y, int rounds) {
  __shared__ float value[128];
  float v = x[threadIdx.x];
  for (int r = 0; r < rounds; ++r) {
    value[threadIdx.x] = v;
    __syncthreads();
    v += 0.5f * value[(threadIdx.x + 32) % 128];
  }
  y[threadIdx.x] = v;
}

// The only barrier is missing: shared memory is read before it is written. NaN, wherever a thread came too early.
__global__ void __launch_bounds__(128) early_read_kernel(const float* x, float* y) {
  __shared__ float value[128];
  value[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = value[127 - threadIdx.x];
}

// Lanes of a warp hand values over without __syncwarp; the shuffle makes them wait, but orders no memory.
__global__ void __launch_bounds__(32) unordered_lanes_kernel(const float* x, float* y) {
  __shared__ float value[32];
  value[threadIdx.x] = x[threadIdx.x];
  const float v = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  y[threadIdx.x] = v + value[31 - threadIdx.x];
}

// A shuffle that only some lanes of its mask reach. An error names both places.
__global__ void divergent_shuffle_kernel(const float* x, float* y, int lanes) {
  float v = x[threadIdx.x];
  if (threadIdx.x < lanes) v += __shfl_xor_sync(~0u, v, 1);
  __syncthreads();
  y[threadIdx.x] = v;
}

// A barrier that only some threads reach, while the others are at the next one.
__global__ void divergent_barrier_kernel(const float* x, float* y, int threads) {
  float v = x[threadIdx.x];
  if (threadIdx.x < threads) {
    __syncthreads();
    v *= 2.0f;
  }
  __syncthreads();
  y[threadIdx.x] = v;
}

// Lanes of one mask in different collectives.
__global__ void mixed_collectives_kernel(const int* x, int* y) {
  if (threadIdx.x % 2) y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  else y[threadIdx.x] = __ballot_sync(~0u, x[threadIdx.x] > 0);
}

// A lane that its own mask leaves out.
__global__ void wrong_mask_kernel(int* y) { y[threadIdx.x] = __any_sync(0x7fffffffu, 1); }

// A shuffle whose mask leaves out the lane that it reads. The value is poison.
__global__ void __launch_bounds__(32) half_mask_kernel(const float* x, float* y) {
  const unsigned half = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  y[threadIdx.x] = __shfl_xor_sync(half, x[threadIdx.x], threadIdx.x % 2 ? 16 : 1);
}

// Reads a lane that has exited. The value is poison.
__global__ void exited_lane_kernel(const float* x, float* y) {
  if (threadIdx.x == 5) return;
  y[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 5);
}

// Only the first block fills the table: the others would find what it left behind. NaN in all blocks but one.
__global__ void __launch_bounds__(32) stale_static_kernel(const float* x, float* y) {
  __shared__ float table[32];
  if (blockIdx.x == 0) table[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = table[threadIdx.x];
}

__global__ void stale_dynamic_kernel(const float* x, float* y) {
  float* table = dynamic_smem<float>();
  if (blockIdx.x == 0) table[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = table[threadIdx.x];
}

// Sums one element more than was written. NaN.
__global__ void unwritten_dynamic_kernel(const float* x, float* y, int n) {
  float* value = dynamic_smem<float>();
  if (threadIdx.x < n) value[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i <= n; ++i) sum += value[i];
  if (threadIdx.x == 0) y[0] = sum;
}

// Takes the result of the block before. Right if blocks run one after another, ascending.
__global__ void cross_block_kernel(const float* x, float* y) {
  y[blockIdx.x] = x[blockIdx.x] + (blockIdx.x > 0 ? y[blockIdx.x - 1] : 0.0f);
}

// Forgets the last element. What the caller put there shows.
__global__ void unwritten_output_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n - 1) y[i] = x[i];
}

// Out of bounds: past global memory, past the dynamic bytes asked for, past a static array.
__global__ void past_global_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i % n] = x[i];
}
__global__ void past_dynamic_kernel(float* y, int n) {
  dynamic_smem<float>()[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  if (threadIdx.x < n) y[threadIdx.x] = 1.0f;
}
__global__ void __launch_bounds__(32) past_static_kernel(float* y, int n) {
  __shared__ float value[32];
  value[threadIdx.x + n] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = value[threadIdx.x];
}

}  // namespace
}  // namespace pyseq

using pyseq::launch;
#pragma GCC visibility push(default)
extern "C" {
int missing_barrier(const float* x, float* y, int rounds) {
  return launch<pyseq::missing_barrier_kernel>(1, 128, 0, nullptr, x, y, rounds);
}
int early_read(const float* x, float* y) { return launch<pyseq::early_read_kernel>(1, 128, 0, nullptr, x, y); }
int unordered_lanes(const float* x, float* y) {
  return launch<pyseq::unordered_lanes_kernel>(1, 32, 0, nullptr, x, y);
}
int divergent_shuffle(const float* x, float* y, int lanes) {
  return launch<pyseq::divergent_shuffle_kernel>(1, 64, 0, nullptr, x, y, lanes);
}
int divergent_barrier(const float* x, float* y, int threads) {
  return launch<pyseq::divergent_barrier_kernel>(1, 64, 0, nullptr, x, y, threads);
}
int mixed_collectives(const int* x, int* y) { return launch<pyseq::mixed_collectives_kernel>(1, 32, 0, nullptr, x, y); }
int wrong_mask(int* y) { return launch<pyseq::wrong_mask_kernel>(1, 32, 0, nullptr, y); }
int half_mask(const float* x, float* y) { return launch<pyseq::half_mask_kernel>(1, 32, 0, nullptr, x, y); }
int exited_lane(const float* x, float* y) { return launch<pyseq::exited_lane_kernel>(1, 32, 0, nullptr, x, y); }
int stale_static(const float* x, float* y, int blocks) {
  return launch<pyseq::stale_static_kernel>(blocks, 32, 0, nullptr, x, y);
}
int stale_dynamic(const float* x, float* y, int blocks) {
  return launch<pyseq::stale_dynamic_kernel>(blocks, 32, 32 * sizeof(float), nullptr, x, y);
}
int unwritten_dynamic(const float* x, float* y, int n) {
  return launch<pyseq::unwritten_dynamic_kernel>(1, 64, 64 * sizeof(float), nullptr, x, y, n);
}
int cross_block(const float* x, float* y, int blocks) {
  return launch<pyseq::cross_block_kernel>(blocks, 1, 0, nullptr, x, y);
}
int unwritten_output(const float* x, float* y, int n) {
  return launch<pyseq::unwritten_output_kernel>((n + 31) / 32, 32, 0, nullptr, x, y, n);
}
int past_global(const float* x, float* y, int n) {
  return launch<pyseq::past_global_kernel>(n / 32 + 1, 32, 0, nullptr, x, y, n);
}
int past_dynamic(float* y, int n) {
  return launch<pyseq::past_dynamic_kernel>(1, 32, 32 * sizeof(float), nullptr, y, n);
}
int past_static(float* y, int n) { return launch<pyseq::past_static_kernel>(1, 32, 0, nullptr, y, n); }
}
#pragma GCC visibility pop
