// CUDA C++ on the CPU, for tests: g++ reads a .cu file through this header instead of <cuda_runtime.h>.
//
// Blocks run one after another, the threads of a block as fibers (block.h) that switch only where they meet. Found that
// way: divergence, missing barriers (results that differ between schedules), reads of shared memory that the block did
// not write, blocks that depend on each other, waits for cp.async that are missing (copies.h); with -fsanitize=thread
// races in shared memory, by name (races.h), and accesses that waste the memory's bandwidth (traffic.h); with
// -fsanitize=address,undefined accesses out of bounds. Not modelled: time, caches, weak memory ordering, blocks that
// wait for other blocks, clusters, TMA, wgmma.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>                                    // types only; nothing of CUDA is linked
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ thread_local                                  // see shared_memory.h
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#include "simt/block.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/shared_memory.h"
#include "simt/warp.h"

inline const uint3& threadIdx = simt::position.thread;
inline const uint3& blockIdx = simt::position.block;
inline const dim3& blockDim = simt::position.threads;
inline const dim3& gridDim = simt::position.blocks;
constexpr int warpSize = simt::kWarp;

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::sync_block({__func__, 0, where}); }
