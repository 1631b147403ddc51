#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyseq {
namespace {

#if defined(__x86_64__)
bool has_f16c() {   // clang 16 does not know this name; that the system saves the registers, avx2 says
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

int forced_or_widest() {
  const int widest = cpu_level_of_machine();
  const char* forced = std::getenv("PYSEQ_CPU");
  if (!forced || !*forced) return widest;
  const std::string name = forced;
  const int level = name == "v2" ? 2 : name == "v3" ? 3 : name == "v4" ? 4 : 0;
  if (level == 0) throw std::runtime_error("PYSEQ_CPU is '" + name + "', expected v2, v3 or v4");
  if (level > widest) {
    throw std::runtime_error("PYSEQ_CPU is '" + name + "', but this machine's widest instruction set is v" + std::to_string(widest));
  }
  return level;
}

}  // namespace

// Features are asked for one by one: g++ 11 does not know the names x86-64-v3 and x86-64-v4.
int cpu_level_of_machine() {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && has_f16c();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return v4 ? 4 : v3 ? 3 : 2;
#else
  return 2;
#endif
}

int cpu_level() {
  static const int level = forced_or_widest();
  return level;
}

bool cpu_has_avx512_bf16() {
  static const bool has = cpu_level() == 4 && has_avx512_bf16();
  return has;
}

}  // namespace pyseq
