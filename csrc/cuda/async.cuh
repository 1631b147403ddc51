// Copies from global to shared memory that bypass the registers and that a thread waits for later (sm_80 on).
#pragma once
#include "cuda/device.cuh"
#ifndef __CUDACC__
#include "simt/copies.h"
#endif

namespace pyseq {

// cp_async<bytes>(to, from, used): copies `used` bytes and zeros after them, `bytes` (4, 8 or 16) in all. Both
// addresses are aligned to `bytes`; where `used` is 0 nothing is read. Copies issued since the last cp_async_commit()
// form a group; cp_async_wait<n>() waits for all groups of this thread but its last n. Other threads see the data after
// a barrier.
#ifdef __CUDACC__

template <int bytes> __device__ __forceinline__ void cp_async(void* to, const void* from, int used = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const unsigned p = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16) {   // past L1: such tiles are read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(p), "l"(from), "r"(used) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(p), "l"(from), "n"(bytes), "r"(used) : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#else
using simt::cp_async;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::cp_async_wait_all;
#endif

}  // namespace pyseq
