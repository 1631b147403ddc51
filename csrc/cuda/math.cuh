// Functions of one float. Approximate instructions where their error is a few ulp, polynomials where they would lose digits.
#pragma once
#include "cuda/device.cuh"

namespace pyseq {

constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ int within(int most, int count) { return min(max(count, 0), most); }

// 2^x, one instruction (2 ulp, denormals flushed to zero); exp(x) = ex2(x log2 e).
__device__ __forceinline__ float ex2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::approximate(exp2f(x));
#endif
}

// log2(x), one instruction: absolute error 2^-22 near 1, so never for log(1 + small).
__device__ __forceinline__ float lg2(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::approximate(log2f(x));
#endif
}

// 1 / x, one instruction, 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::approximate(1.f / x);
#endif
}

// tanh(x), one instruction with a relative error of 2^-11: no good for float32.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return simt::approximate(tanhf(x), 0x1p-11f);
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + ex2(-kLog2e * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_grad(float x) {
  const float s = sigmoid(x);
  return s * fmaf(x, 1.f - s, 1.f);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), the logarithm by a polynomial without constant term: full relative precision
// however small e^-|x| is, which steps of 1e-4 need.
__device__ __forceinline__ float softplus(float x) {
  const float e = ex2(-kLog2e * fabsf(x));
  float p = -3.24402517e-3f;
  p = fmaf(p, e, 1.98514629e-2f);
  p = fmaf(p, e, -5.69595359e-2f);
  p = fmaf(p, e, 1.06036551e-1f);
  p = fmaf(p, e, -1.53055921e-1f);
  p = fmaf(p, e, 1.96759388e-1f);
  p = fmaf(p, e, -2.49541342e-1f);
  p = fmaf(p, e, 3.33299637e-1f);
  p = fmaf(p, e, -4.99999017e-1f);
  return fmaxf(x, 0.f) + e * fmaf(p, e, 1.f);
}

}  // namespace pyseq
