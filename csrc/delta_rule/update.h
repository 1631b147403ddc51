// One row of the state, one token on, which the step and the sequential form share: that makes them agree bit for bit.
// Every column of the state has its own p and y, sums over k in order: it is no matter which columns go together.
#pragma once
#include "cpu/simd.h"
#include "delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr float kSlow = -0.6875f;   // log decays above are slow: a decay of about 1 / 2

inline bool all(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#elif defined(__SSE__)
  return _mm_movemask_ps((__m128)mask) == 0xf;
#else
  for (int i = 0; i < W; ++i) if (!mask[i]) return false;
  return true;
#endif
}
inline vf at_most_0(vf g) { return select(g <= 0.f, g, splat(NAN)); }

// What a token leaves of a row of the state. The decay of a slow row is close to 1, and a float would round away what
// a long memory is made of: it is kept, and applied, as its difference from 1, `kept` being all ones. Otherwise `kept`
// is 0. NaN where g is not <= 0. Returns whether all rows are slow.
inline bool decay_of(vf g, vf& decay, vi& kept) {
  g = at_most_0(g);
  kept = g > kSlow;
  decay = expm1_unit(g);
  if (all(kept)) return true;
  decay = select(kept, decay, exp(g));
  return false;
}

enum class Decay { none, slow, any };   // slow: that of all rows

// One token of a head: rows of K numbers, `a` of the token whose p is summed up.
struct TokenRows {
  const float *q, *k, *a, *b, *decay;
  const int32_t* kept;
};

// Row k of C vectors of columns: S becomes that after the token, y gets its term of the row.
template <bool corrected, Decay decay, int C>
[[gnu::always_inline]] inline void take_row(vf (&S)[C], vf (&y)[C], const vf (&p)[C], const vf (&v)[C],
                                            const TokenRows& x, int64_t k) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    if constexpr (decay == Decay::slow) S[c] = fma(splat(x.decay[k]), S[c], S[c]);
    if constexpr (decay == Decay::any) {
      S[c] = fma(splat(x.decay[k]), S[c], as_float(as_int(S[c]) & splat_int(x.kept[k])));
    }
    if constexpr (corrected) S[c] = fma(splat(x.b[k]), p[c], S[c]);
    S[c] = fma(splat(x.k[k]), v[c], S[c]);
    y[c] = fma(splat(x.q[k]), S[c], y[c]);
  }
}
template <int C> [[gnu::always_inline]] inline void correct_row(vf (&p)[C], const vf (&S)[C], float a) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) p[c] = fma(splat(a), S[c], p[c]);
}

// Calls f.operator()<corrected, decayed>() as s has a and b, and g.
template <class S, class F> inline void for_case(const S& s, const F& f) {
  if (s.a) s.g ? f.template operator()<true, true>() : f.template operator()<true, false>();
  else s.g ? f.template operator()<false, true>() : f.template operator()<false, false>();
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
