// One launch: every block decides whether cu_seqlens is in order, then its threads look up the sequences of their tokens.
// Reading all of cu_seqlens once per block costs less than a second launch; blocks go over tokens so that there are few.
#include "cuda/device.cuh"
#include "cuda/packing.h"

namespace pyseq {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 264;

__global__ void __launch_bounds__(kThreads) packing_kernel(Packed p) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  bool wrong = p.cu_seqlens[0] != 0 || p.cu_seqlens[p.sequences] != p.time;
  for (int64_t s = threadIdx.x; s < p.sequences; s += kThreads) wrong |= p.cu_seqlens[s] > p.cu_seqlens[s + 1];
  __shared__ bool wrong_in_warp[kThreads / 32];
  wrong = __any_sync(~0u, wrong);
  if (threadIdx.x % 32 == 0) wrong_in_warp[threadIdx.x / 32] = wrong;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) wrong |= wrong_in_warp[warp];
  if (first == 0) p.sequence_of[p.time] = wrong ? -1 : int32_t(p.sequences);
  for (int64_t t = first; t < p.time; t += int64_t(gridDim.x) * kThreads) {
    int64_t low = 0, high = wrong ? 0 : p.sequences;   // cu_seqlens[low] <= t < cu_seqlens[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.cu_seqlens[middle] <= t ? low : high) = middle;
    }
    p.sequence_of[t] = wrong ? -1 : int32_t(low);
  }
}

}  // namespace

int packing_cuda(const Packed& p, void* stream) {
  const int64_t blocks = (p.time + kThreads - 1) / kThreads;
  const dim3 grid(unsigned(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks));
  return launch<packing_kernel>(grid, dim3(kThreads), 0, stream, p);
}

}  // namespace pyseq
