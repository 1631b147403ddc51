// Sums over a warp and over a block. The order of additions is fixed, and all threads get the same bits.
#pragma once
#include "cuda/vector.cuh"

namespace pyseq {

// Every lane of the warp must call. Both partners of an exchange add the same two numbers, so all lanes agree.
__device__ __forceinline__ float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Sums y over L neighbouring lanes, of 4 rows, by recursive halving: 4 rows at the price of 3 shuffles where L is 4. A
// lane is left with the sum of row sum_row(lane) of its 4; from the fifth of the L lanes on they are repeated.
__device__ __forceinline__ int sum_row(int lane) { return lane % 2 * 2 + lane / 2 % 2; }
template <int L> __device__ __forceinline__ float sum_over_lanes(const Vec<4>& y, int lane) {
  const bool upper = lane % 2, next = lane / 2 % 2;
  const float give0 = upper ? y[0] : y[2], give1 = upper ? y[1] : y[3];
  const float sum0 = (upper ? y[2] : y[0]) + __shfl_xor_sync(~0u, give0, 1);
  const float sum1 = (upper ? y[3] : y[1]) + __shfl_xor_sync(~0u, give1, 1);
  float sum = (next ? sum1 : sum0) + __shfl_xor_sync(~0u, next ? sum0 : sum1, 2);
#pragma unroll
  for (int d = 4; d < L; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// The same where every lane is to have all four sums.
template <int L> __device__ __forceinline__ void all_over_lanes(Vec<4>& y) {
#pragma unroll
  for (int d = 1; d < L; d *= 2)
#pragma unroll
    for (int r = 0; r < 4; ++r) y[r] += __shfl_xor_sync(~0u, y[r], d);
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
