// A number of which the compiler knows nothing: what only a rare branch computes from it, predicates of every element
// for example, is not computed ahead of that branch, in each round of the loop around it.
#pragma once
#include "cuda/device.cuh"

namespace pyseq {

__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

}  // namespace pyseq
