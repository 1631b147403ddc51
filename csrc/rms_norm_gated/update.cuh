// What the forward and the backward share on a GPU: the gate, and the shape of the grid.
#pragma once
#include "cuda/device.cuh"

namespace pyseq {
namespace {

constexpr int kNormThreads = 128;

__device__ __forceinline__ float sigmoid(float v) { return 1.f / (1.f + ex2(-1.44269504f * v)); }
__device__ __forceinline__ float silu(float v) { return v * sigmoid(v); }
__device__ __forceinline__ float silu_grad(float v) {
  const float s = sigmoid(v);
  return s * (1.f + v * (1.f - s));
}

// Blocks stride over the units beyond 2^20: enough to fill any GPU, and far from the limit of a grid. No grid is empty.
inline dim3 norm_grid(int64_t units) { return dim3(unsigned(units < 1 ? 1 : units < (1 << 20) ? units : 1 << 20)); }

}  // namespace
}  // namespace pyseq
