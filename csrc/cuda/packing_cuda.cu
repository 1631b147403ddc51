// Two launches: one block decides whether cu_seqlens is in order, then a thread per token looks up its sequence.
#include "cuda/device.cuh"
#include "cuda/packing.h"

namespace pyseq {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) packing_check_kernel(Packed p) {
  __shared__ int wrong;
  if (threadIdx.x == 0) wrong = p.cu_seqlens[0] != 0 || p.cu_seqlens[p.sequences] != p.time;
  __syncthreads();
  bool falls = false;
  for (int64_t s = threadIdx.x; s < p.sequences; s += kThreads) falls |= p.cu_seqlens[s] > p.cu_seqlens[s + 1];
  const bool any = __any_sync(~0u, falls);
  if (any && threadIdx.x % 32 == 0) atomicMax(&wrong, 1);
  __syncthreads();
  if (threadIdx.x == 0) p.sequence_of[p.time] = wrong ? -1 : int32_t(p.sequences);
}

__global__ void __launch_bounds__(kThreads) packing_fill_kernel(Packed p) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= p.time) return;
  if (p.sequence_of[p.time] < 0) {
    p.sequence_of[t] = -1;
    return;
  }
  int64_t low = 0, high = p.sequences;   // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.cu_seqlens[middle] <= t ? low : high) = middle;
  }
  p.sequence_of[t] = int32_t(low);
}

}  // namespace

int packing_cuda(const Packed& p, void* stream) {
  if (const int error = launch<packing_check_kernel>(dim3(1), dim3(kThreads), 0, stream, p)) return error;
  if (p.time == 0) return 0;
  return launch<packing_fill_kernel>(dim3(unsigned((p.time + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream, p);
}

}  // namespace pyseq
