// Dot products of pairs of bfloat16, and the rounding to them: instructions that GCC's vector extensions cannot say.
#pragma once
#include "cpu/simd.h"

namespace pyseq::PYSEQ_ISA {

#if defined(__AVX512F__)
// c + a_odd b_odd + a_even b_even for each lane's pair of bfloat16 (the even one in the low half); only behind
// cpu_has_avx512_bf16(). Written as assembly, which needs no compiler flag: the file around it stays plain AVX-512.
inline vf dot_bf16(vi a, vi b, vf c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "vm"(b));
  return c;
}

// Words of two bfloat16, rounded to nearest, ties to even: `even` in the low halves.
inline vi pair_bf16(vf even, vf odd) {
  __m512i halves;   // 16 of even, then 16 of odd
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "vm"(even), "v"(odd));
  const vi lane = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (vi)_mm512_permutexvar_epi16((__m512i)(lane | (lane + 16) << 16), halves);
}
#endif

}  // namespace pyseq::PYSEQ_ISA
