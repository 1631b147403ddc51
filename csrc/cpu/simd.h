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

// From here on the machine takes and leaves denormal numbers as zero, until restored: a state that decays to nothing stays
// fast. Not a guard object: its destructor would make every kernel refer to the C++ runtime's exception handling.
inline unsigned flush_denormals() {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}
inline void restore_denormals([[maybe_unused]] unsigned before) {
#if defined(__SSE__)
  _mm_setcsr(before);
#endif
}

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

// Sums over the lanes of W vectors at once. sum4 leaves a part of (sum a, sum b, sum c, sum d) in every four lanes;
// sum_parts adds them up: lane 4 i + j of its result is the sum over the lanes of vector j of part i.
template <int... i> inline vf pick(vf a, vf b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, vi{i...});   // g++ 11
#endif
}
#if defined(__AVX512F__)
inline vf low1(vf a, vf b) { return pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b); }
inline vf high1(vf a, vf b) { return pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b); }
inline vf low2(vf a, vf b) { return pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b); }
inline vf high2(vf a, vf b) { return pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b); }
inline vf even4(vf a, vf b) { return pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b); }
inline vf odd4(vf a, vf b) { return pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b); }
#elif defined(__AVX__)
inline vf low1(vf a, vf b) { return pick<0, 8, 1, 9, 4, 12, 5, 13>(a, b); }
inline vf high1(vf a, vf b) { return pick<2, 10, 3, 11, 6, 14, 7, 15>(a, b); }
inline vf low2(vf a, vf b) { return pick<0, 1, 8, 9, 4, 5, 12, 13>(a, b); }
inline vf high2(vf a, vf b) { return pick<2, 3, 10, 11, 6, 7, 14, 15>(a, b); }
inline vf even4(vf a, vf b) { return pick<0, 1, 2, 3, 8, 9, 10, 11>(a, b); }
inline vf odd4(vf a, vf b) { return pick<4, 5, 6, 7, 12, 13, 14, 15>(a, b); }
#else
inline vf low1(vf a, vf b) { return pick<0, 4, 1, 5>(a, b); }
inline vf high1(vf a, vf b) { return pick<2, 6, 3, 7>(a, b); }
inline vf low2(vf a, vf b) { return pick<0, 1, 4, 5>(a, b); }
inline vf high2(vf a, vf b) { return pick<2, 3, 6, 7>(a, b); }
inline vf even4(vf a, vf) { return a; }
inline vf odd4(vf, vf b) { return b; }
#endif
inline vf sum_parts(const vf* p) {
  if constexpr (W == 4) return p[0];
  const vf half = even4(p[0], p[1]) + odd4(p[0], p[1]);
  if constexpr (W == 8) return half;
  const vf rest = even4(p[W / 8], p[W / 8 + 1]) + odd4(p[W / 8], p[W / 8 + 1]);
  return even4(half, rest) + odd4(half, rest);
}
inline vf sum4(vf a, vf b, vf c, vf d) {
  const vf ab = low1(a, b) + high1(a, b), cd = low1(c, d) + high1(c, d);
  return low2(ab, cd) + high2(ab, cd);
}

inline void transpose(vf (&row)[W]) {   // unrolled early, so that the rows stay in registers
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {   // four rows: every four lanes become four columns
    const vf a = low1(row[i], row[i + 1]), b = low1(row[i + 2], row[i + 3]);
    const vf c = high1(row[i], row[i + 1]), d = high1(row[i + 2], row[i + 3]);
    row[i] = low2(a, b);
    row[i + 1] = high2(a, b);
    row[i + 2] = low2(c, d);
    row[i + 3] = high2(c, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4 && W > 4; ++i) {   // then the columns of four are put behind one another
    if constexpr (W == 8) {
      const vf a = row[i], b = row[i + 4];
      row[i] = even4(a, b);
      row[i + 4] = odd4(a, b);
    } else {
      const vf a = even4(row[i], row[i + 4 % W]), b = even4(row[i + 8 % W], row[i + 12 % W]);
      const vf c = odd4(row[i], row[i + 4 % W]), d = odd4(row[i + 8 % W], row[i + 12 % W]);
      row[i] = even4(a, b);
      row[i + 4 % W] = even4(c, d);
      row[i + 8 % W] = odd4(a, b);
      row[i + 12 % W] = odd4(c, d);
    }
  }
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
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h & 0x7c00;
  uint32_t bits = uint32_t(h & 0x7fff) << 13;
  if (exponent == 0) {   // subnormal: an integer times 2^-24. Nothing here is subnormal in float32, which may be flushed
    const float f = float(h & 0x3ff) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
  } else {
    bits = exponent == 0x7c00 ? bits | 0x7f800000 : bits + (112u << 23);   // a float32's exponent is biased by 112 more
  }
  bits |= sign;
  float f;
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

inline vf widen(bf16, vh h) { return widen_bf16(h); }
inline vf widen(f16, vh h) { return widen_f16(h); }
inline vh narrow(bf16, vf v) { return narrow_bf16(v); }
inline vh narrow(f16, vf v) { return narrow_f16(v); }

inline vf load(const bf16* p) { vh h; std::memcpy(&h, p, sizeof h); return widen_bf16(h); }
inline vf load(const f16* p) { vh h; std::memcpy(&h, p, sizeof h); return widen_f16(h); }
inline void store(bf16* p, vf v) { const vh h = narrow_bf16(v); std::memcpy(p, &h, sizeof h); }
inline void store(f16* p, vf v) { const vh h = narrow_f16(v); std::memcpy(p, &h, sizeof h); }

#if defined(__AVX512F__)
inline __mmask16 lanes(int64_t n) { return __mmask16((1u << n) - 1); }   // the first n < W
#endif

template <class T> inline vf load(const T* p, int64_t n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vf)_mm512_maskz_loadu_ps(lanes(n), p);
  else return widen(T{}, (vh)_mm256_maskz_loadu_epi16(lanes(n), p));
#else
  T lane[W] = {};
  std::memcpy(lane, p, n * sizeof(T));
  return load(lane);
#endif
}
template <class T> inline void store(T* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, lanes(n), (__m512)v);
  else _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)narrow(T{}, v));
#else
  T lane[W];
  store(lane, v);
  std::memcpy(p, lane, n * sizeof(T));
#endif
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

// 2^r for r in [-1/2, 1/2]: minimax polynomial of degree 5 with p(0) = 1 and p'(0) = ln 2, 1.05e-7. The exact slope leaves no
// bias near 0, where the decays of a long memory are: a bias there would add up over the tokens.
inline vf exp2_fraction(vf r) {
  vf p = splat(1.330060574e-3f);
  p = fma(p, r, splat(9.669691416e-3f));
  p = fma(p, r, splat(5.550558342e-2f));
  p = fma(p, r, splat(2.402228198e-1f));
  p = fma(p, r, splat(6.931471825e-1f));
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

// e^x - 1 for x in [-ln 2, 0]: x times a minimax polynomial of degree 5 with p(0) = 1, 2e-8.
inline vf expm1_unit(vf x) {
  vf p = splat(1.035710098e-3f);
  p = fma(p, x, splat(8.073253557e-3f));
  p = fma(p, x, splat(4.157695547e-2f));
  p = fma(p, x, splat(1.666529328e-1f));
  p = fma(p, x, splat(4.999993145e-1f));
  return x * fma(p, x, splat(1.f));
}

// log(1 + x) for x in [0, 1]: x times a minimax polynomial of degree 9, 4.7e-9.
inline vf log1p_unit(vf x) {
  vf p = splat(-3.24402517e-3f);
  p = fma(p, x, splat(1.98514629e-2f));
  p = fma(p, x, splat(-5.69595359e-2f));
  p = fma(p, x, splat(1.06036551e-1f));
  p = fma(p, x, splat(-1.53055921e-1f));
  p = fma(p, x, splat(1.96759388e-1f));
  p = fma(p, x, splat(-2.49541342e-1f));
  p = fma(p, x, splat(3.33299637e-1f));
  p = fma(p, x, splat(-4.99999017e-1f));
  return x * fma(p, x, splat(1.f));
}

// log(1 + e^v) = max(v, 0) + log(1 + e^-|v|): 3e-7 relative at either end. Above 20 it is v, as everyone's definition wants:
// the second term is below half a unit in the last place. The derivative is sigmoid(v), and 1 above 20.
inline vf softplus(vf v, vf& derivative) {
  const vf e = exp(as_float(as_int(v) | splat_int(INT32_MIN)));
  derivative = select(v < 0.f, e, splat(1.f)) / (1.f + e);
  return at_least(v, 0.f) + log1p_unit(e);
}
inline vf softplus(vf v) { vf unused; return softplus(v, unused); }

// 1 + e^-v: exp() with its argument mirrored, q = v + whole ln 2, which saves the negation.
inline vf one_plus_exp_minus(vf v) {
  v = at_most(at_least(v, -89.f), 104.f);
  const vf whole = nearest(v * -kLog2e);
  const vf q = fma(whole, 1.42860677e-6f, fma(whole, 0.693145752f, v));
  vf p = splat(-8.290306665e-03f);
  p = fma(p, q, splat(4.189793766e-02f));
  p = fma(p, q, splat(-1.666763574e-01f));
  p = fma(p, q, splat(4.999915063e-01f));
  p = fma(p, q, splat(-9.999997020e-01f));
  return scale(fma(p, q, splat(1.f)), whole) + 1.f;
}
inline vf sigmoid(vf v) { return 1.f / one_plus_exp_minus(v); }
inline vf silu(vf v) { return v / one_plus_exp_minus(v); }
inline vf silu_grad(vf v) { const vf s = sigmoid(v); return s * fma(v, 1.f - s, splat(1.f)); }

}  // namespace pyseq::PYSEQ_ISA
