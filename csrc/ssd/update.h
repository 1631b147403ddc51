// Step sizes and decays, which every form shares; and one token of the recurrence, which the step and the sequential
// form share, which makes them agree bit for bit.
#pragma once
#include "cpu/simd.h"
#include "ssd/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr float kSlow = -0.6875f;   // log decays above are slow: a decay of about 1 / 2

// delta of `lanes` heads from dt: bias, softplus, limits. NaN stays NaN.
template <class S> inline vf step_size(const S& s, vf dt, vf bias) {
  vf delta = dt + bias;
  if (s.dt_softplus) delta = softplus(delta);
  return at_most(at_least(delta, s.dt_low), s.dt_high);
}

// The logarithm of the decay; NaN where A is not <= 0.
inline vf log_decay(vf delta, vf A) { return select(A <= 0.f, at_least(delta * A, kLeast), splat(NAN)); }

// What a step leaves of a state, from its log decay. The decay of a slow step is close to 1, and a float would round
// away what a long memory is made of: it is kept, and applied, as its difference from 1.
inline vi is_slow(vf log_a) { return log_a > kSlow; }
inline vf decay_of(vf log_a) { return select(is_slow(log_a), expm1_unit(log_a), exp(log_a)); }
template <bool slow> inline vf decayed(vf decay, vf S) { return slow ? fma(decay, S, S) : decay * S; }

// W states of a channel; dx = delta x
template <bool slow> inline vf next(vf decay, vf S, vf dx, vf B) {
  return slow ? fma(dx, B, decayed<true>(decay, S)) : fma(decay, S, dx * B);
}

// <C, S> of a channel is one chain of fma over the vectors of states, then a tree over the lanes: lane i of the result
// is the sum over the lanes of total[i].
inline vf sum_rows(const vf (&total)[W]) {
  vf parts[W / 4];
#pragma GCC unroll 4
  for (int i = 0; i < W / 4; ++i) parts[i] = sum4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
  return sum_parts(parts);
}

// W channels of y from v = S C: the skip and the gate.
template <class S> inline vf output(const S& s, vf v, vf x, int64_t z_at, int64_t head, int64_t p) {
  const int64_t left = s.width - p;
  if (s.D) v = fma(s.D_width > 1 ? load(s.D + head * s.width + p, left) : splat(s.D[head]), x, v);
  return s.z ? v * silu(load(s.z, z_at, left)) : v;
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
