#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// One batch row; M is the state's element type. The window of a channel is its W-1 neighbouring state elements and x.
template <class E, class M>
void row(const CausalConv1dStep& c, int64_t b) {
  const E* x = static_cast<const E*>(c.x.data) + b * c.x.stride[0];
  E* y = static_cast<E*>(c.y.data) + b * c.y.stride[0];
  M* state = static_cast<M*>(c.state.data) + b * c.state.stride[0];
  const int64_t taps = c.W - 1, channel = c.state.stride[1];
  for (int64_t d = 0; d < c.D; d += W) {
    const int64_t n = c.D - d < W ? c.D - d : W;
    const vf newest = load(x + d, n);
    vf a = c.bias ? load(c.bias + d, n) : vf{};
    for (int64_t k = 0; k < taps; ++k) {
      a = fma(gather(c.weight + d * c.W + k, c.W, n), gather(state + d * channel + k, channel, n), a);
    }
    a = fma(gather(c.weight + d * c.W + taps, c.W, n), newest, a);
    store(y + d, c.silu ? silu(a) : a, n);
    if (taps == 0) continue;
    for (int64_t i = 0; i < n; ++i) {
      M* s = state + (d + i) * channel;
      for (int64_t k = 0; k + 1 < taps; ++k) s[k] = s[k + 1];
    }
    scatter(state + d * channel + taps - 1, channel, newest, n);
  }
}

template <class E>
auto row_of(DType state) { return state == DType::f32 ? row<E, float> : row<E, bf16>; }

}  // namespace

void causal_conv1d_step(const CausalConv1dStep& c, int64_t begin, int64_t end) {
  const auto f = c.x.type == DType::f32 ? row_of<float>(c.state.type)
               : c.x.type == DType::bf16 ? row_of<bf16>(c.state.type) : row_of<f16>(c.state.type);
  for (int64_t b = begin; b < end; ++b) f(c, b);
}

}  // namespace pyseq::PYSEQ_ISA
