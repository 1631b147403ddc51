// Products of small matrices from shared memory on the tensor cores, by one warp, 16 rows by 16 columns by 16 at a time.
//
// An operand lies in shared memory row by row, or, `transposed`, column by column. Operands are
//   Half   float16, in units that its largest number decides: unlike bfloat16 it has 11 bits for what was computed
//   Parts  bfloat16, hi + lo, which keeps 16 bits: two products
//   Full   float32, each number in two parts of 11 bits, of whose four products the smallest is left out
// In fragments of Full the 8 terms of a sum come in the order 0, 2, 4, 6, 1, 3, 5, 7, so that results can be operands as they
// are. Lane 4 g + t has of a result d[n][r] = D[g + 8 (r / 2)][8 n + 2 t + r % 2].
#pragma once
#include "cuda/mma.cuh"
#include "cuda/vector.cuh"

namespace pyseq {
namespace {

using Result = float[2][4];

template <class T> struct Matrix {
  T* at;
  int stride;
};

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ unsigned pack_half(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ float low_of(unsigned both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high_of(unsigned both) { return __uint_as_float(both & 0xffff0000u); }

// What the two types of 16 bits share.
template <class Element> struct Words {
  using T = Element;
  struct A { unsigned v[4]; };
  struct B { unsigned v[2][2]; };

  template <bool transposed> static __device__ __forceinline__ A load_a(Matrix<const T> m, int lane) {
    A a;
    if constexpr (transposed) ldmatrix<4, true>(a.v, m.at + (lane % 8 + lane / 16 * 8) * m.stride + lane / 8 % 2 * 8);
    else ldmatrix<4>(a.v, m.at + lane % 16 * m.stride + lane / 16 * 8);
    return a;
  }
  // Transposed: its columns, the terms of a sum, lie row by row.
  template <bool transposed> static __device__ __forceinline__ B load_b(Matrix<const T> m, int lane) {
    unsigned v[4];
    if constexpr (transposed) ldmatrix<4>(v, m.at + (lane % 8 + lane / 16 * 8) * m.stride + lane / 8 % 2 * 8);
    else ldmatrix<4, true>(v, m.at + lane % 16 * m.stride + lane / 16 * 8);
    return {{{v[0], v[1]}, {v[2], v[3]}}};
  }
  static __device__ __forceinline__ void multiply(Result& d, const A& a, const B& b) {
    mma<T>(d[0], a.v, b.v[0]);
    mma<T>(d[1], a.v, b.v[1]);
  }
};

struct Parts : Words<__nv_bfloat16> {
  using Words::multiply;
  struct Computed { A hi, lo; };

  static __device__ __forceinline__ Computed computed(const Result& d) {
    Computed s;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = d[n][2 * r], high = d[n][2 * r + 1];
        const unsigned hi = pack_bf16(low, high);
        s.hi.v[2 * n + r] = hi;
        s.lo.v[2 * n + r] = pack_bf16(low - low_of(hi), high - high_of(hi));
      }
    return s;
  }
  // Ones where row < column.
  static __device__ __forceinline__ B ones_above(int lane) {
    B b;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int k = 8 * r + lane % 4 * 2, column = 8 * n + lane / 4;
        b.v[n][r] = (k < column ? 0x3f80u : 0u) | (k + 1 < column ? 0x3f800000u : 0u);
      }
    return b;
  }
  static __device__ __forceinline__ void multiply(Result& d, const Computed& a, const B& b) {
    multiply(d, a.lo, b);
    multiply(d, a.hi, b);
  }
};

struct Half : Words<__half> {
  using Exact = Parts;
  using Computed = A;
  static constexpr bool kScaled = true;

  static __device__ __forceinline__ A computed(const Result& d) {
    return {{pack_half(d[0][0], d[0][1]), pack_half(d[0][2], d[0][3]), pack_half(d[1][0], d[1][1]),
             pack_half(d[1][2], d[1][3])}};
  }
  // Of numbers in float32, times `scale`.
  template <bool transposed> static __device__ __forceinline__ A load_computed(Matrix<const float> m, float scale, int lane) {
    A a;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r % 2 * 8, k = r / 2 * 8 + lane % 4 * 2;
      const float* p = m.at + (transposed ? k * m.stride + row : row * m.stride + k);
      a.v[r] = pack_half(p[0] * scale, p[transposed ? m.stride : 1] * scale);
    }
    return a;
  }
  // 16 by 16 numbers as a result has them.
  template <bool transposed> static __device__ __forceinline__ void load_result(Result& d, Matrix<const T> m, int lane) {
    unsigned v[4];
    ldmatrix<4, transposed>(v, transposed ? m.at + (lane % 8 + lane / 16 * 8) * m.stride + lane / 8 % 2 * 8
                                          : m.at + lane % 16 * m.stride + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = __half22float2(*reinterpret_cast<const __half2*>(v + i));
      d[i / 2][i % 2 * 2] = x.x, d[i / 2][i % 2 * 2 + 1] = x.y;
    }
  }
  static __device__ __forceinline__ float2 pair(const T* p) { return __half22float2(*reinterpret_cast<const __half2*>(p)); }
  static __device__ __forceinline__ void store_pair(T* p, float low, float high) {
    *reinterpret_cast<unsigned*>(p) = pack_half(low, high);
  }
};

struct Full {
  using T = float;
  struct A { float v[2][4]; };
  struct B { float v[2][2][2]; };
  using Exact = Full;
  using Computed = A;
  static constexpr bool kScaled = false;

  template <bool transposed> static __device__ __forceinline__ A load_a(Matrix<const T> m, int lane) {
    A a;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r, column = 8 * k + lane % 4 * 2;
        const float* p = m.at + (transposed ? column * m.stride + row : row * m.stride + column);
        a.v[k][r] = p[0];
        a.v[k][r + 2] = p[transposed ? m.stride : 1];
      }
    return a;
  }
  template <bool transposed> static __device__ __forceinline__ B load_b(Matrix<const T> m, int lane) {
    B b;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 8 * k + lane % 4 * 2, column = 8 * n + lane / 4;
        const float* p = m.at + (transposed ? column * m.stride + row : row * m.stride + column);
        b.v[n][k][0] = p[0];
        b.v[n][k][1] = p[transposed ? 1 : m.stride];
      }
    return b;
  }
  static __device__ __forceinline__ A computed(const Result& d) {
    A s;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) s.v[n][r / 2 + r % 2 * 2] = d[n][r];
    return s;
  }
  template <bool transposed> static __device__ __forceinline__ A load_computed(Matrix<const float> m, float, int lane) {
    return load_a<transposed>(m, lane);
  }
  static __device__ __forceinline__ B ones_above(int lane) {
    B b;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = 8 * (i / 2 % 2) + lane % 4 * 2 + i % 2, column = i / 4 * 8 + lane / 4;
      b.v[i / 4][i / 2 % 2][i % 2] = k < column ? 1.f : 0.f;
    }
    return b;
  }
  static __device__ __forceinline__ float head(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
  static __device__ __forceinline__ void multiply(Result& d, const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      unsigned hi[4], lo[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        hi[r] = __float_as_uint(head(a.v[k][r]));
        lo[r] = __float_as_uint(a.v[k][r] - head(a.v[k][r]));
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        unsigned b_hi[2], b_lo[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          b_hi[r] = __float_as_uint(head(b.v[n][k][r]));
          b_lo[r] = __float_as_uint(b.v[n][k][r] - head(b.v[n][k][r]));
        }
        mma<float>(d[n], lo, b_hi);
        mma<float>(d[n], hi, b_lo);
        mma<float>(d[n], hi, b_hi);
      }
    }
  }
  template <bool transposed> static __device__ __forceinline__ void load_result(Result& d, Matrix<const T> m, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      d[i / 4][i % 4] = m.at[transposed ? column * m.stride + row : row * m.stride + column];
    }
  }
  static __device__ __forceinline__ float2 pair(const T* p) { return *reinterpret_cast<const float2*>(p); }
  static __device__ __forceinline__ void store_pair(T* p, float low, float high) {
    *reinterpret_cast<float2*>(p) = {low, high};
  }
};

}  // namespace
}  // namespace pyseq
