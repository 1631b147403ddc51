// Matrices of float32 in shared memory whose 16 by 16 parts are operands of products on tensor cores, and how many bits
// of them a product keeps: 22, in two parts of 11 each, of whose four products the smallest is left out; or 11.
#pragma once
#include "cuda/operands.cuh"

namespace pyseq {
namespace {

// `rows` by `width` numbers, row by row. Where the terms of sums lie in rows, 8 floats between them keep the banks
// apart, where in columns 4.
template <int rows, int width, int apart = 8> struct Panel {
  static constexpr int kStride = width + apart, kBytes = rows * kStride * 4;
  float* at;

  __device__ __forceinline__ float* place(int row, int column) const { return at + row * kStride + column; }
  // Operand A from row `row` and column `column` on, and operand B, whose terms lie in a row, or in a column.
  __device__ __forceinline__ Full::A a(int row, int column, int lane) const {
    Full::A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Vec<2> pair = load_vec<2>(place(row + lane / 4 + i % 2 * 8, column + i / 2 * 8 + lane % 4 * 2));
      a.v[i / 2][i % 2] = pair[0];
      a.v[i / 2][i % 2 + 2] = pair[1];
    }
    return a;
  }
  template <bool in_column> __device__ __forceinline__ Full::B b(int row, int column, int lane) const {
    if constexpr (in_column) {
      return Full::load_b<false>({place(row, column), kStride}, lane);
    } else {
      Full::B b;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Vec<2> pair = load_vec<2>(place(row + i / 2 * 8 + lane / 4, column + i % 2 * 8 + lane % 4 * 2));
        b.v[i / 2][i % 2][0] = pair[0];
        b.v[i / 2][i % 2][1] = pair[1];
      }
      return b;
    }
  }
};

// The last 13 bits are cut off of what is left, which has no more than 13.
struct Two {
  unsigned hi, lo;
};
__device__ __forceinline__ Two in_two(float x) {
  const float head = Full::head(x);
  return {__float_as_uint(head), __float_as_uint(x - head)};
}

// Operands A that are data of 16 bits have no second part: `exact`.
template <bool exact> __device__ __forceinline__ void multiply(Result& d, const Full::A& a, const Full::B& b) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    unsigned hi[4], lo[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Two both = in_two(a.v[k][r]);
      hi[r] = exact ? __float_as_uint(a.v[k][r]) : both.hi;
      lo[r] = both.lo;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Two first = in_two(b.v[n][k][0]), second = in_two(b.v[n][k][1]);
      if constexpr (!exact) mma_tf32(d[n], lo, {first.hi, second.hi});
      mma_tf32(d[n], hi, {first.lo, second.lo});
      mma_tf32(d[n], hi, {first.hi, second.hi});
    }
  }
}

// Both operands rounded to 11 bits.
__device__ __forceinline__ void multiply_rounded(Result& d, const Full::A& a, const Full::B& b) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    unsigned left[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) left[r] = __float_as_uint(a.v[k][r]);
#pragma unroll
    for (int n = 0; n < 2; ++n)
      mma<float>(d[n], left, {__float_as_uint(b.v[n][k][0]), __float_as_uint(b.v[n][k][1])});
  }
}

// Operand A with only the first `terms` of the 16 terms of a sum.
__device__ __forceinline__ Full::A first_terms(Full::A a, int terms, int lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int k = i / 4 * 8 + lane % 4 * 2 + i % 4 / 2;
    a.v[i / 4][i % 4] = k < terms ? a.v[i / 4][i % 4] : 0.f;
  }
  return a;
}

}  // namespace
}  // namespace pyseq
