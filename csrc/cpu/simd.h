// The whole SIMD library: vectors of W floats at the register width of the instruction set this file is compiled for,
// ordinary operators (GCC vector extensions), and the handful of functions the recurrences need.
// Everything is float32. Results depend on nothing but the operands: contraction is off, fma() is explicit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "view.h"

namespace pyseq::PYSEQ_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));   // bfloat16 or float16 bits

inline vf splat(float x) { return x - vf{}; }   // x - 0 is x, -0 too, and folds to one broadcast; x + 0 does not
inline vi splat_int(int32_t x) { return vi{} + x; }
inline vf as_float(vi x) { return (vf)x; }
inline vi as_int(vf x) { return (vi)x; }

inline vf fma(vf a, vf b, vf c) {   // a b + c; two roundings where the machine has no fused form (v2)
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
inline vf fma(vf a, float b, vf c) { return fma(a, splat(b), c); }
inline vf fnma(vf a, vf b, vf c) { return fma(-a, b, c); }   // c - a b

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// The machine's max and min return their second operand if either is NaN: NaN stays NaN.
inline vf at_least(vf v, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)splat(bound), (__m512)v);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)splat(bound), (__m256)v);
#elif defined(__SSE__)
  return (vf)_mm_max_ps((__m128)splat(bound), (__m128)v);
#else
  return v < bound ? splat(bound) : v;
#endif
}
inline vf at_most(vf v, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)splat(bound), (__m512)v);
#elif defined(__AVX__)
  return (vf)_mm256_min_ps((__m256)splat(bound), (__m256)v);
#elif defined(__SSE__)
  return (vf)_mm_min_ps((__m128)splat(bound), (__m128)v);
#else
  return v > bound ? splat(bound) : v;
#endif
}

inline float sum(vf v) {   // a fixed tree: halves are added until one lane is left
  float lane[W];
  std::memcpy(lane, &v, sizeof v);
  for (int n = W / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

// ---- memory: W elements from p, or the first n < W of them with zeros behind -----------------------------------------

inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vi widen(vh h) {   // GCC 12 takes convertvector apart into halves
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vi);
#endif
}
inline vf widen_bf16(vh h) { return as_float(widen(h) << 16); }

inline vh narrow_bf16(vf v) {   // to nearest, ties to even; NaN stays NaN
  const vi bits = as_int(v);
  const vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((v != v ? splat_int(0x7fc00000) : rounded) >> 16, vh);
}

#if !defined(__F16C__)
inline float widen_f16_bits(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  // Shifting the float16 exponent into float32's place leaves it 112 too small; a multiply by 2^112 mends subnormals too.
  uint32_t bits = rest;
  float f;
  std::memcpy(&f, &bits, 4);
  f = (h & 0x7c00) == 0x7c00 ? f : f * 0x1p112f;
  std::memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow_f16_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;    // NaN
  if (bits >= 0x47800000) return sign | 0x7c00;   // 2^16 and above
  if (bits < 0x38800000) {                        // subnormal: adding 0.5 leaves the rounded bits in the low mantissa
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&bits, &f, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);             // carries into the exponent, and into infinity from 65520
  return sign | uint16_t((bits - 0x38000000) >> 13);
}
#endif

inline vf widen_f16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = widen_f16_bits(h[i]);
  return v;
#endif
}

inline vh narrow_f16(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vh h;
  for (int i = 0; i < W; ++i) h[i] = narrow_f16_bits(v[i]);
  return h;
#endif
}

// The element type of a tensor, as the kernels' one template parameter. load<T> and store<T> convert.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vf load(const bf16* p) { vh h; std::memcpy(&h, p, sizeof h); return widen_bf16(h); }
inline vf load(const f16* p) { vh h; std::memcpy(&h, p, sizeof h); return widen_f16(h); }
inline void store(bf16* p, vf v) { const vh h = narrow_bf16(v); std::memcpy(p, &h, sizeof h); }
inline void store(f16* p, vf v) { const vh h = narrow_f16(v); std::memcpy(p, &h, sizeof h); }

template <class T> inline vf load(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T lane[W] = {};
  std::memcpy(lane, p, n * sizeof(T));
  return load(lane);
}
template <class T> inline void store(T* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  T lane[W];
  store(lane, v);
  std::memcpy(p, lane, n * sizeof(T));
}

// The same with the dtype known only at run time: a branch per vector, for tensors off the hot path.
inline vf load(const View& x, int64_t i, int64_t n = W) {
  switch (x.type) {
    case DType::bf16: return load(static_cast<const bf16*>(x.data) + i, n);
    case DType::f16: return load(static_cast<const f16*>(x.data) + i, n);
    default: return load(static_cast<const float*>(x.data) + i, n);
  }
}
inline void store(const View& x, int64_t i, vf v, int64_t n = W) {
  switch (x.type) {
    case DType::bf16: return store(static_cast<bf16*>(x.data) + i, v, n);
    case DType::f16: return store(static_cast<f16*>(x.data) + i, v, n);
    default: return store(static_cast<float*>(x.data) + i, v, n);
  }
}

// ---- functions ---------------------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504088896340736f;

inline vf nearest(vf x) {   // the nearest integer; |x| < 2^22 where there is no instruction for it
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + 12582912.f) - 12582912.f;   // 1.5 * 2^23: the sum is rounded to an integer
#endif
}

inline vf scale(vf p, vf whole) {   // p 2^whole
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  // Two factors, so that neither leaves the exponent range: 2^whole goes down to subnormals and up to infinity.
  const vi e = __builtin_convertvector(whole, vi), half = e >> 1;
  return p * as_float((half + 127) << 23) * as_float((e - half + 127) << 23);
#endif
}

inline vf exp2_fraction(vf r) {   // 2^r for r in [-1/2, 1/2]: minimax polynomial of degree 5 with p(0) = 1, 9.2e-8
  vf p = splat(1.326472731e-3f);
  p = fma(p, r, splat(9.671512991e-3f));
  p = fma(p, r, splat(5.550733581e-2f));
  p = fma(p, r, splat(2.402224243e-1f));
  p = fma(p, r, splat(6.931470037e-1f));
  return fma(p, r, splat(1.f));
}

// 2^x: 2e-7 relative; 0 from 2^-150 down, infinity from 2^128 up, NaN for NaN; exp2(0) is 1.
inline vf exp2(vf x) {
#if !defined(__AVX512F__)
  x = at_most(at_least(x, -150.f), 129.f);
#endif
  const vf whole = nearest(x);
  return scale(exp2_fraction(x - whole), whole);
}

// e^x: 2e-7 relative. ln 2 is split in two, so that whole * ln2_high is exact and large x lose nothing; then a minimax
// polynomial of degree 5 with p(0) = 1 on [-ln 2 / 2, ln 2 / 2], 9.5e-8.
inline vf exp(vf x) {
  x = at_most(at_least(x, -104.f), 89.f);
  const vf whole = nearest(x * kLog2e);
  const vf r = fma(whole, -1.42860677e-6f, fma(whole, -0.693145752f, x));
  vf p = splat(8.290306665e-03f);
  p = fma(p, r, splat(4.189793766e-02f));
  p = fma(p, r, splat(1.666763574e-01f));
  p = fma(p, r, splat(4.999915063e-01f));
  p = fma(p, r, splat(9.999997020e-01f));
  return scale(fma(p, r, splat(1.f)), whole);
}

// log(1 + x), x >= 0: 2e-7 relative down to the smallest x.
inline vf log1p(vf x) {
  const vf u = x + 1.f;
  const vf lost = select(u < 1e30f, x - (u - 1.f), vf{});   // what the addition rounded away
  const vi shift = (as_int(u) - 0x3f3504f3) & ~0x7fffff;      // u = 2^k m with m in [sqrt(1/2), sqrt(2))
  const vf k = __builtin_convertvector(shift >> 23, vf);
  const vf m = as_float(as_int(u) - shift) - 1.f;
  const vf m2 = m * m;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  const vf log_m = m + fma(m2, splat(-0.5f), m * m2 * p);
  const vf y = fma(k, splat(0.693147181f), log_m) + lost / u;
  return select(u < INFINITY, y, x);                         // inf and NaN pass through
}

// softplus(v) = v above 20, else log(1 + e^v); its derivative is sigmoid(v), and 1 above 20.
inline vf softplus(vf v) { return select(v > 20.f, v, log1p(exp(at_most(v, 20.f)))); }
inline vf sigmoid(vf v) { return 1.f / (1.f + exp(-v)); }
inline vf softplus_grad(vf v) { return select(v > 20.f, splat(1.f), sigmoid(v)); }
inline vf silu(vf v) { return v * sigmoid(v); }
inline vf silu_grad(vf v) { const vf s = sigmoid(v); return s * fma(v, 1.f - s, splat(1.f)); }

}  // namespace pyseq::PYSEQ_ISA
