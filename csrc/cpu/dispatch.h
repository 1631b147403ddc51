// PYSEQ_DISPATCH(fn) names v2::fn, v3::fn or v4::fn: the widest instruction set that this machine has and this build holds.
//   v2 SSE4.2 (on a machine that is not x86-64: the natural width)   v3 AVX2 + FMA + F16C   v4 AVX-512 F, BW, CD, DQ, VL + VNNI
#pragma once

namespace pyseq {

int cpu_level();              // 2, 3 or 4; PYSEQ_CPU=v2|v3|v4 in the environment forces one, read once
int cpu_level_of_machine();   // the widest one, whatever was forced
bool cpu_has_avx512_bf16();   // vdpbf16ps, and cpu_level() is 4

}  // namespace pyseq

#if defined(__x86_64__)
#define PYSEQ_DISPATCH(fn) (pyseq::cpu_level() == 4 ? v4::fn : pyseq::cpu_level() == 3 ? v3::fn : v2::fn)
#else
#define PYSEQ_DISPATCH(fn) (v2::fn)
#endif
