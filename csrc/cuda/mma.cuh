// Matrix products by a whole warp on the tensor cores, and the loads that bring their operands from shared memory.
#pragma once
#include "cuda/device.cuh"
#ifndef __CUDACC__
#include "simt/tensor.h"
#endif

namespace pyseq {

// D [16, 8] += A [16, K] B [K, 8], where T is __nv_bfloat16 or __half (K = 16), float (K = 8, A and B rounded to tf32)
// or int8_t (K = 32, D int). Each register of A and B holds e = K / 8 elements, the first in its low bits.
// Lane 4 g + t has
//   a[r] = A[g + 8 (r % 2)][4 e (r / 2) + e t, ...]
//   b[r] = B[4 e r + e t, ...][g]
//   d[r] = D[g + 8 (r / 2)][2 t + r % 2]
// mma_tf32 is that of float without the rounding: of A and B, the 13 last bits are cut off.
#ifdef __CUDACC__

template <class T> struct MmaAccumulator { using type = float; };
template <> struct MmaAccumulator<int8_t> { using type = int; };

__device__ __forceinline__ unsigned to_tf32(unsigned bits) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
__device__ __forceinline__ void mma(typename MmaAccumulator<T>::type (&d)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2]) {
  if constexpr (sizeof(T) == 1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (sizeof(T) == 4) {
    const unsigned rounded_a[4] = {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])};
    const unsigned rounded_b[2] = {to_tf32(b[0]), to_tf32(b[1])};
    mma_tf32(d, rounded_a, rounded_b);
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else
using simt::mma;
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const auto cut = [](unsigned bits) { return bits & ~0x1fffu; };
  mma<float>(d, {cut(a[0]), cut(a[1]), cut(a[2]), cut(a[3])}, {cut(b[0]), cut(b[1])});
}
#endif

// Loads n = 1, 2 or 4 matrices of 8 rows of 8 16-bit elements from shared memory: lane 8 i + j gives the address of row
// j of matrix i, aligned to 16 bytes (lanes from 8 n on: any). Lane 4 g + t gets in register i elements 2 t and 2 t + 1
// of row g of matrix i, or, transposed, of its column g.
#ifdef __CUDACC__

template <int n, bool transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&r)[n], const void* row) {
  static_assert(n == 1 || n == 2 || n == 4);
  const unsigned p = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (n == 1 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  } else if constexpr (n == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  } else if constexpr (n == 2 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(p) : "memory");
  } else if constexpr (n == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(p) : "memory");
  } else if constexpr (!transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
  }
}

#else
using simt::ldmatrix;
#endif

}  // namespace pyseq
