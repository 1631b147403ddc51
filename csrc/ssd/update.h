// One token of one head, in float32. The sequential form and the step share it, which makes them agree bit for bit.
#pragma once
#include <cmath>

#include "cpu/simd.h"
#include "ssd/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline float load_one(const View& x, int64_t i) { return load(x, i, 1)[0]; }

// delta from dt: bias, softplus, limits. NaN stays NaN.
template <class S> inline float step_size(const S& s, float dt, int64_t head) {
  float delta = s.dt_bias ? dt + s.dt_bias[head] : dt;
  if (s.dt_softplus) delta = softplus(splat(delta))[0];
  delta = delta < s.dt_low ? s.dt_low : delta;
  return delta > s.dt_high ? s.dt_high : delta;
}

// NaN where A is not <= 0.
inline float log_decay(float delta, float A) { return A <= 0.f ? std::fmax(delta * A, kLeast) : NAN; }

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
