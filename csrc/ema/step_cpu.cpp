#include "ema/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

template <class E, class M> void row(const EmaStep& s, int64_t b) {
  const E* const x = static_cast<const E*>(s.x.data) + b * s.x.stride[0];
  E* const out = static_cast<E*>(s.y.data) + b * s.y.stride[0];
  M* const state = static_cast<M*>(s.state.data) + b * s.state.stride[0];
  const vf p = splat(load(s.p, b * s.p.stride[0], 1)[0]);
  for (int64_t d = 0; d < s.dim; d += W) {
    const vf y = next(p, load(x + d, s.dim - d), load(state + d, s.dim - d));
    store(state + d, y, s.dim - d);
    store(out + d, y, s.dim - d);
  }
}

template <class E> void row(const EmaStep& s, int64_t b) {
  s.state.type == DType::f32 ? row<E, float>(s, b) : row<E, bf16>(s, b);
}

}  // namespace

void ema_step(const EmaStep& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  for (int64_t b = begin; b < end; ++b) {
    s.x.type == DType::f32 ? row<float>(s, b) : s.x.type == DType::bf16 ? row<bf16>(s, b) : row<f16>(s, b);
  }
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
