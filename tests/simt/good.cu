// Kernels without a fault: right numbers, the same bits in every order.
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/math.cuh"
#include "cuda/reduce.cuh"

namespace pyseq {
namespace {

struct Pair { float a, x; };                                     // h -> a h + x
__device__ __forceinline__ Pair compose(Pair first, Pair then) {
  return {first.a * then.a, fmaf(then.a, first.x, then.x)};
}

// h[t] = a[t] h[t-1] + x[t], one block per row: a scan by shuffles within a warp, then over the warps in shared memory.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) scan_kernel(const float* a, const float* x, float* h, int time) {
  __shared__ Pair warp_total[kThreads / 32];
  __shared__ float carry;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t(blockIdx.x) * time;
  if (threadIdx.x == 0) carry = 0.0f;
  __syncthreads();
  for (int begin = 0; begin < time; begin += kThreads) {
    const int t = begin + threadIdx.x;
    Pair p = t < time ? Pair{a[row + t], x[row + t]} : Pair{1.0f, 0.0f};
    for (int d = 1; d < 32; d *= 2) {
      const Pair before{__shfl_up_sync(~0u, p.a, d), __shfl_up_sync(~0u, p.x, d)};
      if (lane >= d) p = compose(before, p);
    }
    if (lane == 31) warp_total[warp] = p;
    __syncthreads();
    Pair before{1.0f, carry};
    for (int w = 0; w < warp; ++w) before = compose(before, warp_total[w]);
    p = compose(before, p);
    if (t < time) h[row + t] = p.x;
    __syncthreads();                                             // carry and warp_total are read above
    if (threadIdx.x == kThreads - 1) carry = p.x;
    __syncthreads();
  }
}

// y[block] = sum of its n / gridDim.x elements by a tree in dynamic shared memory; counts its additions with an atomic.
__global__ void tree_sum_kernel(const float* x, float* y, int* additions, int n) {
  float* part = dynamic_smem<float>();
  const int per_block = n / gridDim.x;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) sum += x[blockIdx.x * per_block + i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      part[threadIdx.x] += part[threadIdx.x + half];
      atomicAdd(additions, 1);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}

// Reverses n values, n not a multiple of a warp: the other threads leave at once, and nobody waits for them.
__global__ void early_exit_kernel(const int* x, int* y, int* warp_sum, int n) {
  __shared__ int values[256];
  const int i = threadIdx.x;
  if (i >= n) return;
  values[i] = x[i];
  __syncthreads();
  y[i] = values[n - 1 - i];
  const int total = __reduce_add_sync(~0u, x[i]);
  if (i % 32 == 0) warp_sum[i / 32] = total;
}

// One warp in a two-dimensional block; each lane writes its row of 14 results.
__global__ void collectives_kernel(const int* x, long long* out, int width) {
  const int lane = threadIdx.x + blockDim.x * threadIdx.y, v = x[lane];
  long long* row = out + lane * 14;
  row[0] = __shfl_sync(~0u, v, 3, width);
  row[1] = __shfl_up_sync(~0u, v, 3, width);
  row[2] = __shfl_down_sync(~0u, v, 3, width);
  row[3] = __shfl_xor_sync(~0u, v, 5, width);
  row[4] = __ballot_sync(~0u, v > 0);
  row[5] = __any_sync(~0u, v == 7);
  row[6] = __all_sync(~0u, v < 1000);
  row[7] = __reduce_add_sync(~0u, v);
  row[8] = __reduce_min_sync(~0u, v);
  row[9] = __reduce_max_sync(~0u, v);
  row[10] = __reduce_or_sync(~0u, unsigned(v));
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;   // two groups meet on their own
  if (lane < 16) row[11] = __shfl_xor_sync(half, v, 1);
  else row[11] = __shfl_xor_sync(half, v, 2);
  row[12] = static_cast<long long>(__shfl_down_sync(~0u, double(v), 1));
  __syncwarp(half);
  row[13] = __popc(__ballot_sync(half, v > 0));
}

template <class T> __global__ void scale_kernel(const T* x, T* y, float factor, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) store(y + i, factor * load(x + i));
}

// y[row] = (sum of x, sum of x^2): block_sum twice in a row.
__global__ void __launch_bounds__(96) moments_kernel(const float* x, float* y, int n) {
  float first = 0.0f, second = 0.0f;
  for (int i = threadIdx.x; i < n; i += 96) {
    const float v = x[int64_t(blockIdx.x) * n + i];
    first += v, second = fmaf(v, v, second);
  }
  first = block_sum<96>(first);
  second = block_sum<96>(second);
  y[blockIdx.x * 96 * 2 + threadIdx.x * 2] = first;
  y[blockIdx.x * 96 * 2 + threadIdx.x * 2 + 1] = second;
}

// Reverses each half warp through shared memory, ordered by __syncwarp of that half alone, and counts the even values.
__global__ void __launch_bounds__(64) half_warps_kernel(const int* x, int* y, int* even) {
  __shared__ int value[64];
  __shared__ int count;
  const int i = threadIdx.x, half = i / 16 * 16;
  const unsigned mask = 0xffffu << (half % 32);
  if (i == 0) count = 0;
  for (int rounds = 0; rounds < 3; ++rounds) {
    value[i] = x[i];
    __syncwarp(mask);
    y[i] = value[half + 15 - i % 16];
    __syncwarp(mask);                                            // value is read above, written in the next round
  }
  __syncthreads();
  if (x[i] % 2 == 0) atomicAdd(&count, 1);
  __syncthreads();
  if (i == 0) *even = count;
}

// Five functions of x[i], one after another.
__global__ void functions_kernel(const float* x, float* y, int n) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  const float v[5] = {ex2(x[i]), lg2(x[i]), reciprocal(x[i]), tanh_approx(x[i]), softplus(x[i])};
  for (int k = 0; k < 5; ++k) y[k * n + i] = v[k];
}

__global__ void nothing_kernel() {}

}  // namespace
}  // namespace pyseq

using pyseq::launch;
namespace {
template <class T> int scale(const T* x, T* y, float factor, int n) {
  return launch<pyseq::scale_kernel<T>>((n + 31) / 32, 32, 0, nullptr, x, y, factor, n);
}
}  // namespace
#pragma GCC visibility push(default)
extern "C" {
int scan(const float* a, const float* x, float* h, int rows, int time) {
  return launch<pyseq::scan_kernel<128>>(rows, 128, 0, nullptr, a, x, h, time);
}
int tree_sum(const float* x, float* y, int* additions, int blocks, int n) {
  return launch<pyseq::tree_sum_kernel>(blocks, 64, 64 * sizeof(float), nullptr, x, y, additions, n);
}
int early_exit(const int* x, int* y, int* warp_sum, int n) {
  return launch<pyseq::early_exit_kernel>(1, 256, 0, nullptr, x, y, warp_sum, n);
}
int collectives(const int* x, long long* out, int width) {
  return launch<pyseq::collectives_kernel>(1, dim3(8, 4), 0, nullptr, x, out, width);
}
int scale_bf16(const void* x, void* y, float factor, int n) {
  return scale(static_cast<const __nv_bfloat16*>(x), static_cast<__nv_bfloat16*>(y), factor, n);
}
int scale_fp16(const void* x, void* y, float factor, int n) {
  return scale(static_cast<const __half*>(x), static_cast<__half*>(y), factor, n);
}
int moments(const float* x, float* y, int rows, int n) {
  return launch<pyseq::moments_kernel>(rows, 96, 0, nullptr, x, y, n);
}
int half_warps(const int* x, int* y, int* even) {
  return launch<pyseq::half_warps_kernel>(1, 64, 0, nullptr, x, y, even);
}
int functions(const float* x, float* y, int n) {
  return launch<pyseq::functions_kernel>(1, 128, 0, nullptr, x, y, n);
}
int nothing(const unsigned* grid, const unsigned* block, size_t smem) {
  const dim3 g(grid[0], grid[1], grid[2]), b(block[0], block[1], block[2]);
  return launch<pyseq::nothing_kernel>(g, b, smem, nullptr);
}
}
#pragma GCC visibility pop
