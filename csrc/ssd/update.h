// Step sizes and decays. The sequential form, the step and the chunked forms share them.
#pragma once
#include "cpu/simd.h"
#include "ssd/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline float load_one(const View& x, int64_t i) { return load(x, i, 1)[0]; }

// delta of `lanes` heads from dt: bias, softplus, limits. NaN stays NaN.
template <class S> inline vf step_size(const S& s, vf dt, int64_t head, int64_t lanes) {
  vf delta = s.dt_bias ? dt + load(s.dt_bias + head, lanes) : dt;
  if (s.dt_softplus) delta = softplus(delta);
  return at_most(at_least(delta, s.dt_low), s.dt_high);
}

// The logarithm of the decay; NaN where A is not <= 0.
inline vf log_decay(vf delta, vf A) { return select(A <= 0.f, at_least(delta * A, kLeast), splat(NAN)); }

template <class S> inline float step_size(const S& s, float dt, int64_t head) {
  return step_size(s, splat(dt), head, 1)[0];
}
inline float log_decay(float delta, float A) { return log_decay(splat(delta), splat(A))[0]; }

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
