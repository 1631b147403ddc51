// What one card can do at most, by kernels that do nothing else. Compiled by the nvcc that compiles pyseq's kernels.
//   ex2:  2^x per second, the special-function unit that bounds a selective scan
//   mma:  bf16 operations per second of mma.sync (through wmma), a multiply-add counting two
//   l2:   bytes per second read from a buffer that the L2 cache holds
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>

namespace {

constexpr int kThreads = 256, kRounds = 512, kChains = 8;

__global__ void ex2_kernel(float* out, float x) {
  float v[kChains];
  for (int i = 0; i < kChains; ++i) v[i] = x + 1e-3f * float(i + threadIdx.x % 7);
  for (int r = 0; r < kRounds; ++r)
    for (int i = 0; i < kChains; ++i) v[i] = exp2f(-v[i]);   // ex2.approx.ftz under -use_fast_math; its fixed point is 0.64
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += v[i];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void mma_kernel(float* out, float x) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> a;
  fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> b;
  fragment<accumulator, 16, 16, 16, float> c[4];
  fill_fragment(a, __float2bfloat16(x + float(threadIdx.x) * 1e-3f));
  fill_fragment(b, __float2bfloat16(x - float(threadIdx.x) * 1e-3f));
  for (int i = 0; i < 4; ++i) fill_fragment(c[i], 0.f);
  for (int r = 0; r < kRounds; ++r)
    for (int i = 0; i < 4; ++i) mma_sync(c[i], a, b, c[i]);
  float sum = 0;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < c[i].num_elements; ++k) sum += c[i].x[k];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void l2_kernel(float* out, const float4* in, int vectors) {
  float sum = 0;
  for (int r = 0; r < 16; ++r)
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < vectors; i += gridDim.x * kThreads) {
      const float4 v = __ldcg(in + i);   // not from L1
      sum += v.x + v.y + v.z + v.w;
    }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Seconds of the best of five runs, or a negative number after a CUDA error.
template <class F> double best(const F& run) {
  cudaEvent_t begin, end;
  if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess) return -1;
  float least = 1e30f;
  for (int i = 0; i < 6; ++i) {
    cudaEventRecord(begin);
    run();
    cudaEventRecord(end);
    if (cudaEventSynchronize(end) != cudaSuccess || cudaGetLastError() != cudaSuccess) return -1;
    float milliseconds;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i > 0 && milliseconds < least) least = milliseconds;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return least * 1e-3;
}

}  // namespace

extern "C" {

// `scratch`: at least 4 blocks x kThreads floats, blocks = 8 per multiprocessor.
double ex2_per_second(float* scratch, int blocks) {
  const double seconds = best([&] { ex2_kernel<<<blocks, kThreads>>>(scratch, 0.5f); });
  return double(blocks) * kThreads * kRounds * kChains / seconds;
}

double mma_per_second(float* scratch, int blocks) {
  const double seconds = best([&] { mma_kernel<<<blocks, kThreads>>>(scratch, 0.5f); });
  return double(blocks) * (kThreads / 32) * kRounds * 4 * 2 * 16 * 16 * 16 / seconds;
}

double l2_bytes_per_second(float* scratch, int blocks, const void* buffer, int bytes) {
  const int vectors = bytes / 16;
  const double seconds = best([&] { l2_kernel<<<blocks, kThreads>>>(scratch, static_cast<const float4*>(buffer), vectors); });
  return 16.0 * vectors * 16 / seconds;
}

}  // extern "C"
