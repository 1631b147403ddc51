// Products of tiles on the tensor cores, computed operands in two parts.
//
// A of x is x, and B of x its transpose: multiply(d, A(x), B(y)) adds x y^T.
//   Tf32   for any data: parts of 11 bits, all products but the smallest: 22 bits
//   Bf16   for bfloat16: parts of 8 bits, 16 in all, in half as many instructions that do twice the work
#pragma once
#include "cuda/mma.cuh"
#include "delta_rule/backward.cuh"

namespace pyseq::delta_rule {
namespace {

struct Tf32 {
  using Exact = Tf32;
  using Data = Any;
  struct A { unsigned high[2][4], low[2][4]; };
  struct B { unsigned high[2][2][2], low[2][2][2]; };   // of 8 rows of the transpose and 8 terms

  static __device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
    high = __float_as_uint(x) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
  }
  static __device__ __forceinline__ A a(const Tile& x) {
    A y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int to = i % 4 / 2 + i % 2 * 2;
      split(x.v[i / 4][i % 4], y.high[i / 4][to], y.low[i / 4][to]);
    }
    return y;
  }
  static __device__ __forceinline__ B b(const Tile& x) {
    B y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i % 4 / 2, k = i / 4;
      split(x.v[k][i % 4], y.high[n][k][i % 2], y.low[n][k][i % 2]);
    }
    return y;
  }
  static __device__ __forceinline__ void multiply(Tile& d, const A& x, const B& y) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_tf32(d.v[n], x.low[k], y.high[n][k]);
        mma_tf32(d.v[n], x.high[k], y.low[n][k]);
        mma_tf32(d.v[n], x.high[k], y.high[n][k]);
      }
  }
};

struct Bf16 {
  using Data = __nv_bfloat16;
  using Exact = Tf32;   // for what reaches G, which is summed up
  struct A { unsigned high[4], low[4]; };
  struct B { unsigned high[2][2], low[2][2]; };

  static __device__ __forceinline__ unsigned pack(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
  }
  static __device__ __forceinline__ void split(float first, float second, unsigned& high, unsigned& low) {
    high = pack(first, second);
    low = pack(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u));
  }
  static __device__ __forceinline__ A a(const Tile& x) {
    A y;
#pragma unroll
    for (int r = 0; r < 4; ++r) split(x.v[r / 2][r % 2 * 2], x.v[r / 2][r % 2 * 2 + 1], y.high[r], y.low[r]);
    return y;
  }
  static __device__ __forceinline__ B b(const Tile& x) {
    B y;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k) split(x.v[k][2 * n], x.v[k][2 * n + 1], y.high[n][k], y.low[n][k]);
    return y;
  }
  static __device__ __forceinline__ void multiply(Tile& d, const A& x, const B& y) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma<__nv_bfloat16>(d.v[n], x.low, y.high[n]);
      mma<__nv_bfloat16>(d.v[n], x.high, y.low[n]);
      mma<__nv_bfloat16>(d.v[n], x.high, y.high[n]);
    }
  }
};

}  // namespace
}  // namespace pyseq::delta_rule
