// What the forward and the backward share on a GPU: the shape of the grid.
#pragma once
#include "cuda/device.cuh"
#include "cuda/math.cuh"

namespace pyseq {
namespace {

constexpr int kNormThreads = 128;

// Blocks stride over the units beyond 2^20: enough to fill any GPU, and far from the limit of a grid. No grid is empty.
inline dim3 norm_grid(int64_t units) { return dim3(unsigned(units < 1 ? 1 : units < (1 << 20) ? units : 1 << 20)); }

}  // namespace
}  // namespace pyseq
