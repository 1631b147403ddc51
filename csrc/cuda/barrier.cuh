// Barriers for some threads of a block.
#pragma once
#include "cuda/device.cuh"
#ifndef __CUDACC__
#include "simt/barriers.h"
#endif

namespace pyseq {

// named_barrier(id, threads): waits until that many threads, whole warps of them, have come to barrier `id`, 1 to 15.
//
// mbarrier_init(b, count) by one thread, then __syncthreads(). A phase completes when `count` threads have called
// mbarrier_arrive(b), and the next begins; mbarrier_wait(b, parity) waits for the phase of that parity, 0 for the
// first. What a thread wrote before it arrived, those who waited may read.
#ifdef __CUDACC__

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void mbarrier_init(uint64_t* b, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* b) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* b, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{\n.reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  } while (!done);
}

#else
using simt::mbarrier_arrive;
using simt::mbarrier_init;
using simt::mbarrier_wait;
using simt::named_barrier;
#endif

}  // namespace pyseq
