#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// W channels whose `taps` numbers lie side by side, as `taps` vectors of channels, and back.
template <int taps, class M>
inline void split(const M* p, M (*lane)[W]) {
  for (int i = 0; i < W; ++i) {
    for (int k = 0; k < taps; ++k) lane[k][i] = p[i * taps + k];
  }
}
template <int taps, class M>
inline void join(const M (*lane)[W], M* p) {
  for (int i = 0; i < W; ++i) {
    for (int k = 0; k < taps; ++k) p[i * taps + k] = lane[k][i];
  }
}

// W channels of widths 1 to 4, their state dense.
template <int width, class M>
inline vf convolve_and_shift(const float* weight_at, M* state, vf newest, vf bias) {
  float taps[width][W];
  M samples[width][W];
  split<width>(weight_at, taps);
  split<width - 1>(state, samples);
  vf weight[width], window[width];
  for (int k = 0; k < width; ++k) weight[k] = load(taps[k]);
  for (int k = 0; k < width - 1; ++k) window[k] = load(samples[k]);
  window[width - 1] = newest;
  store(samples[width - 1], newest);
  join<width - 1>(samples + 1, state);
  return convolve(weight, window, bias);
}

// n channels of any width, `channel` apart in the state.
template <class M>
vf convolve_and_shift_wide(const CausalConv1dStep& c, M* state, int64_t channel, int64_t d, vf newest, vf a,
                           int64_t n) {
  for (int64_t k = 0; k < c.W; ++k) {
    const vf sample = k < c.W - 1 ? gather(state + k, channel, n) : newest;
    a = fma(gather(c.weight + d * c.W + k, c.W, n), sample, a);
    if (k > 0) scatter(state + k - 1, channel, sample, n);
  }
  return a;
}

// width: the one that is specialised; any other runs through the general form.
template <class E, class M, int width>
void row(const CausalConv1dStep& c, int64_t b) {
  const E* x = static_cast<const E*>(c.x.data) + b * c.x.stride[0];
  E* y = static_cast<E*>(c.y.data) + b * c.y.stride[0];
  M* state = static_cast<M*>(c.state.data) + b * c.state.stride[0];
  const int64_t channel = c.state.stride[1];
  for (int64_t d = 0; d < c.D; d += W) {
    const int64_t n = c.D - d < W ? c.D - d : W;
    const vf newest = load(x + d, n), bias = c.bias ? load(c.bias + d, n) : vf{};
    const bool dense = c.W == width && n == W && channel == width - 1;
    const vf a = dense ? convolve_and_shift<width>(c.weight + d * width, state + d * channel, newest, bias)
                       : convolve_and_shift_wide(c, state + d * channel, channel, d, newest, bias, n);
    store(y + d, c.silu ? silu(a) : a, n);
  }
}

template <class E, class M>
auto row_of(int64_t width) {
  return width == 4 ? row<E, M, 4> : width == 3 ? row<E, M, 3> : width == 2 ? row<E, M, 2> : row<E, M, 1>;
}

template <class E>
auto row_of(const CausalConv1dStep& c) {
  return c.state.type == DType::f32 ? row_of<E, float>(c.W) : row_of<E, bf16>(c.W);
}

}  // namespace

void causal_conv1d_step(const CausalConv1dStep& c, int64_t begin, int64_t end) {
  const DType type = c.x.type;
  const auto f = type == DType::f32 ? row_of<float>(c) : type == DType::bf16 ? row_of<bf16>(c) : row_of<f16>(c);
  for (int64_t b = begin; b < end; ++b) f(c, b);
}

}  // namespace pyseq::PYSEQ_ISA
