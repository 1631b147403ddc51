// Sums over a warp and over a block. The order of additions is fixed, and all threads get the same bits.
#pragma once
#include "cuda/device.cuh"

namespace pyseq {

// Every lane of the warp must call. Both partners of an exchange add the same two numbers, so all lanes agree.
__device__ __forceinline__ float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Every thread of a one-dimensional block of kThreads must call. Shared memory: 4 bytes per warp.
template <int kThreads> __device__ __forceinline__ float block_sum(float x) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / 32;
  __shared__ float warp_total[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warp_total[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += warp_total[w];
  __syncthreads();   // warp_total is read above, written by the next call
  return total;
}

}  // namespace pyseq
