// Single-thread built-ins: bit casts, counting, cache hints, atomics, and fast-math functions. The latter are computed
// exactly here and approximately on a GPU; approximate() can put an error of that size into them.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }

namespace simt {
inline uint64_t noise_seed = 0;                                  // 0: functions are exact

// In [-1, 1), drawn from the seed and `bits`.
inline double noise(uint32_t bits) {
  if (noise_seed == 0) return 0.0;
  uint64_t h = (noise_seed ^ bits) * 0x9e3779b97f4a7c15u;
  h = (h ^ h >> 29) * 0xbf58476d1ce4e5b9u;
  return double(int64_t(h ^ h >> 32)) * 0x1p-63;
}

// What an approximate instruction may give where `exact` is the result: off by up to `relative` of it, and always by
// the same for the same value. A GPU too gives 0, +-1 and infinities exactly.
inline float approximate(float exact, float relative = 0x1p-22f) {
  if (noise_seed == 0 || exact == 0.0f || std::abs(exact) == 1.0f || !std::isfinite(exact)) return exact;
  return float(exact * (1.0 + noise(std::bit_cast<uint32_t>(exact)) * relative));
}
}  // namespace simt

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// A product or sum that is not contracted into a fused multiply-add.
[[gnu::noinline]] inline float __fmul_rn(float a, float b) { return a * b; }
[[gnu::noinline]] inline float __fadd_rn(float a, float b) { return a + b; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> void __stcs(T* p, T value) { *p = value; }

inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibers give way only where they meet, so plain updates are atomic.
namespace simt {
template <class T, class Change> __attribute__((no_sanitize("thread"))) T update(T* p, Change change) {
  const T old = *p;
  *p = change(old);
  return old;
}
}  // namespace simt
template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) {
  return simt::update(p, [=](T old) { return T(old + v); });
}
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) {
  return simt::update(p, [=](T old) { return max(old, v); });
}
template <class T> T atomicMin(T* p, std::type_identity_t<T> v) {
  return simt::update(p, [=](T old) { return min(old, v); });
}
template <class T> T atomicExch(T* p, std::type_identity_t<T> v) {
  return simt::update(p, [=](T) { return v; });
}
template <class T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return simt::update(p, [=](T old) { return old == expected ? v : old; });
}
