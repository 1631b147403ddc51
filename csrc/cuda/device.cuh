// The only file that knows which compiler reads a .cu: nvcc, or g++ for the emulator that tests run on.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "simt/simt.h"
#endif

#include <cstddef>

#include "view.h"

namespace pyseq {

// launch<kernel>(grid, block, bytes of dynamic shared memory, stream, arguments...) returns a cudaError_t.
// It neither synchronises nor allocates. Launches are recorded under the kernel's name on the emulator.
template <auto kernel, class... Arguments>
int launch(dim3 grid, dim3 block, size_t dynamic_smem_bytes, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 32 * 1024;   // of the 48 KB that need no permission; the rest is for static memory
  if (dynamic_smem_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_smem_bytes));
    if (error != cudaSuccess) return error;
  }
#else
  simt::name_kernel(reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__);
#endif
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The most dynamic shared memory that a block may have on the current device.
inline size_t shared_limit() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? size_t(bytes) : 0;
#else
  return simt::kMaxSharedMemory;
#endif
}

// The dynamic shared memory of the block, aligned to 16 bytes at least.
template <class T> __device__ __forceinline__ T* dynamic_smem() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return reinterpret_cast<T*>(simt::dynamic_shared);
#endif
}

// Storage is float, bf16 or fp16; arithmetic is float. One rounding, to nearest even, at the store.
__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }

// The same with the dtype known only at run time: one uniform branch per element, for tensors off the hot path.
__device__ __forceinline__ float load(const View& x, int64_t i) {
  switch (x.type) {
    case DType::bf16: return load(static_cast<const __nv_bfloat16*>(x.data) + i);
    case DType::f16: return load(static_cast<const __half*>(x.data) + i);
    default: return load(static_cast<const float*>(x.data) + i);
  }
}
__device__ __forceinline__ void store(const View& x, int64_t i, float v) {
  switch (x.type) {
    case DType::bf16: return store(static_cast<__nv_bfloat16*>(x.data) + i, v);
    case DType::f16: return store(static_cast<__half*>(x.data) + i, v);
    default: return store(static_cast<float*>(x.data) + i, v);
  }
}

}  // namespace pyseq
