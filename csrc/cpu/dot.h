// Dot products of pairs: the one instruction that GCC's vector extensions cannot say.
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
#endif

}  // namespace pyseq::PYSEQ_ISA
