// What tests/build/test_budgets.py looks for in machine code. GROWN makes kernels of the same names larger.
#ifndef GROWN
#define GROWN 0
#endif

namespace pyseq {
namespace {

// A loop with one load, one exponential and one store, around one with a shuffle and a barrier: none may be missed.
__global__ void __launch_bounds__(128) nested_kernel(float* x, int rows, int columns) {
  __shared__ float row[128];
  for (int r = 0; r < rows; ++r) {
    float sum = 0.f;
#pragma unroll 1
    for (int c = threadIdx.x; c < columns; c += 128) sum += exp2f(x[r * columns + c]);
    row[threadIdx.x] = sum + __shfl_xor_sync(~0u, sum, 1);
    __syncthreads();
    x[r * columns + threadIdx.x] = row[127 - threadIdx.x];
    __syncthreads();
  }
}

// Where it is grown, a load of 16 bytes becomes four of 4.
template <int n> __global__ void __launch_bounds__(256) template_kernel(const float4* x, float* y) {
  float sum = 0.f;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#if GROWN
    const float* p = reinterpret_cast<const float*>(x) + i * 257 + threadIdx.x;
    const float4 v{p[0], p[1], p[2], p[3]};
#else
    const float4 v = x[i * 257 + threadIdx.x];
#endif
    sum += v.x * v.y + v.z * v.w;
  }
  y[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(1) registers_kernel(const float* x, float* y, int steps) {
  constexpr int kValues = GROWN ? 40 : 8;
  float v[kValues];
  for (int i = 0; i < kValues; ++i) v[i] = x[i];
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    for (int i = 0; i < kValues; ++i) v[i] = v[i] * v[(i + 1) % kValues] + v[(i + 3) % kValues];
  }
  for (int i = 0; i < kValues; ++i) y[i] = v[i];
}

#if GROWN
__global__ void __launch_bounds__(1024, 2) spill_kernel(const float* x, float* y, int steps) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int s = 0; s < steps; ++s) {
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 1) % 64] + v[(i + 7) % 64];
  }
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = v[i];
}

__global__ void __launch_bounds__(128) global_atomic_kernel(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }

__global__ void __launch_bounds__(128) shared_atomic_kernel(const float* x, float* y) {
  __shared__ float sum;
  sum = 0.f;
  __syncthreads();
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  *y = sum;
}

__global__ void __launch_bounds__(128) float64_kernel(const float* x, float* y) {
  y[threadIdx.x] = float(x[threadIdx.x] * 1.1);
}

__global__ void unbounded_kernel(float* x) { x[threadIdx.x] = 0.f; }
#else
__global__ void __launch_bounds__(128) retired_kernel(int* x) { atomicAdd(x, 1); }   // integers: in any order
#endif

}  // namespace

void launch(float* x, int n) {
  nested_kernel<<<1, 128>>>(x, n, n);
  template_kernel<16><<<1, 256>>>(reinterpret_cast<float4*>(x), x);
  registers_kernel<<<1, 1>>>(x, x, n);
#if GROWN
  spill_kernel<<<1, 1024>>>(x, x, n);
  global_atomic_kernel<<<1, 128>>>(x, x);
  shared_atomic_kernel<<<1, 128>>>(x, x);
  float64_kernel<<<1, 128>>>(x, x);
  unbounded_kernel<<<1, 128>>>(x);
#else
  retired_kernel<<<1, 128>>>(reinterpret_cast<int*>(x));
#endif
}

}  // namespace pyseq
