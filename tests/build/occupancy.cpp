// NVIDIA's own calculator, to compare with: lines of numbers in, blocks per multiprocessor out.
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
  cudaOccDeviceProp card{};
  cudaOccFuncAttributes kernel{};
  cudaOccDeviceState state{};
  cudaOccResult result{};
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.numBlockBarriers = 1;
  card.maxThreadsPerBlock = 1024;
  card.regsPerBlock = card.regsPerMultiprocessor = 65536;
  card.warpSize = 32;
  card.numSms = 100;
  card.sharedMemPerBlock = 48 << 10;
  card.reservedSharedMemPerBlock = 1024;
  int threads;
  size_t dynamic;
  while (std::scanf("%d %d %d %zu %zu %d %d %zu %zu", &card.computeMajor, &card.computeMinor,
                    &card.maxThreadsPerMultiprocessor, &card.sharedMemPerMultiprocessor, &card.sharedMemPerBlockOptin,
                    &kernel.numRegs, &threads, &kernel.sharedSizeBytes, &dynamic) == 9) {
    kernel.maxThreadsPerBlock = threads;
    kernel.maxDynamicSharedSizeBytes = dynamic;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &card, &kernel, &state, threads, dynamic);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
