// One token of the recurrence, which the step and the sequential form share, which makes them agree bit for bit:
// every column of S and every sum over the keys has an order of its own, however many columns are taken at a time.
#pragma once
#include "cpu/simd.h"
#include "gated_delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

enum class Gate { none, one, per_key };

template <class S> inline Gate gate_of(const S& s) {
  return !s.g ? Gate::none : s.one_decay ? Gate::one : Gate::per_key;
}

// Calls f.operator()<gate>().
template <class F> inline void with_gate(Gate gate, const F& f) {
  if (gate == Gate::none) f.template operator()<Gate::none>();
  else if (gate == Gate::one) f.template operator()<Gate::one>();
  else f.template operator()<Gate::per_key>();
}

constexpr float kSlow = -0.6875f;   // log decays above are slow: a decay of about 1 / 2

// What a decay leaves of S is by S + (S where `whole`). A slow decay is close to 1, and a float would round away what
// a long memory is made of: it is kept, and applied, as its difference from 1.
struct Decay {
  vf by;
  vi whole;
};

inline vf checked_gate(vf g) { return select(g <= 0.f, g, splat(NAN)); }
inline Decay decay_of(vf g) {   // g checked
  const vi slow = g > kSlow;
  return {select(slow, expm1_unit(at_least(g, -0.7f)), exp(g)), slow};
}
inline vf decayed(vf by, vi whole, vf S) { return fma(by, S, as_float(as_int(S) & whole)); }

// A token as the products read it: K floats each of k, q, and of k after the decay; per key, also the decays.
struct Token {
  float *k, *q, *decayed_k, *by;   // by, whole: one with one decay, unused without
  int32_t* whole;
};

// Fills the arrays of a token. g is ignored without a decay.
template <Gate gate>
inline void prepare(const Token& t, const View& k, int64_t k_at, const View& q, int64_t q_at, const View& g,
                    int64_t g_at, int64_t keys) {
  Decay d = {};
  if constexpr (gate == Gate::one) {
    d = decay_of(checked_gate(splat(load(g, g_at, 1)[0])));
    t.by[0] = d.by[0];
    t.whole[0] = d.whole[0];
  }
  for (int64_t i = 0; i < keys; i += W) {
    if constexpr (gate == Gate::per_key) {
      d = decay_of(checked_gate(load(g, g_at + i, keys - i)));
      store(t.by + i, d.by);
      std::memcpy(t.whole + i, &d.whole, sizeof d.whole);
    }
    const vf v = load(k, k_at + i, keys - i);
    store(t.k + i, v);
    store(t.q + i, load(q, q_at + i, keys - i));
    store(t.decayed_k + i, gate == Gate::none ? v : decayed(d.by, d.whole, v));
  }
}

template <int N, class T> [[gnu::always_inline]] inline vf load_column(const T* at, int64_t left) {
  return N == 1 ? load(at, left) : load(at);
}

// d = S^T k, from S before the decay and k after it. N vectors of columns; of one vector, `left` columns.
template <int N, class T>
[[gnu::always_inline]] inline void read(vf (&d)[N], const T* S, int64_t stride, const float* decayed_k, int64_t keys,
                                        int64_t left) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) d[n] = vf{};
  for (int64_t i = 0; i < keys; ++i) {
    const vf k = splat(decayed_k[i]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) d[n] = fma(load_column<N>(S + i * stride + n * W, left), k, d[n]);
  }
}

// S = decayed S + k u^T and y = S^T q; with a next token, d = S^T of its decayed k.
template <int N, Gate gate, bool more, class T>
[[gnu::always_inline]] inline void advance(T* S, int64_t stride, const Token& t, const float* next, const vf (&u)[N],
                                           vf (&y)[N], vf (&d)[N], int64_t keys, int64_t left) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) y[n] = vf{}, d[n] = vf{};
  vf by = {};
  vi whole = {};
  if constexpr (gate == Gate::one) by = splat(t.by[0]), whole = splat_int(t.whole[0]);
  for (int64_t i = 0; i < keys; ++i) {
    if constexpr (gate == Gate::per_key) by = splat(t.by[i]), whole = splat_int(t.whole[i]);
    const vf k = splat(t.k[i]), q = splat(t.q[i]), k_next = more ? splat(next[i]) : vf{};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* const at = S + i * stride + n * W;
      vf v = load_column<N>(at, left);
      if constexpr (gate != Gate::none) v = decayed(by, whole, v);
      v = fma(k, u[n], v);
      if constexpr (N == 1) store(at, v, left);
      else store(at, v);
      y[n] = fma(v, q, y[n]);
      if constexpr (more) d[n] = fma(v, k_next, d[n]);
    }
  }
}

inline vf correction(float beta, vf v, vf d) { return beta * (v - d); }   // u

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
