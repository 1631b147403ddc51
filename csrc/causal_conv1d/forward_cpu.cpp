#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kSweep = 8;   // rows abreast: enough to keep a column's weights in registers, few enough streams to prefetch

// Tokens [t, end) of n channels from d on, with the window of the last samples in registers.
template <class E, int width, bool whole>
void walk(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t end, int64_t d, int64_t n) {
  if constexpr (whole) n = W;
  vf weight[width], window[width];
  for (int k = 0; k < width; ++k) weight[k] = weight_at(c, k, d, n);
  for (int k = 0; k + 1 < width; ++k) window[k] = sample<E>(c, s, t - (width - 1) + k, d, n);
  const vf bias = bias_at(c, d, n);
  const E* x = s.at<const E>(c, c.x, t, d);
  E* y = s.at<E>(c, c.y, t, d);
  for (; t < end; ++t, x += c.x.stride[1], y += c.y.stride[1]) {
    window[width - 1] = load(x, n);
    const vf a = convolve(weight, window, bias);
    store(y, c.silu ? silu(a) : a, n);
    for (int k = 0; k + 1 < width; ++k) window[k] = window[k + 1];
  }
}

template <class E>
void walk_wide(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t end, int64_t d, int64_t n) {
  for (; t < end; ++t) {
    const vf a = convolve_wide<E>(c, s, t, d, n);
    store(s.at<E>(c, c.y, t, d), c.silu ? silu(a) : a, n);
  }
}

template <class E, int width>
void unit(const CausalConv1d& c, int64_t run, int64_t d_begin, int64_t d_end) {
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kSweep) {
      const int64_t t_end = t + kSweep < end ? t + kSweep : end;
      for (int64_t d = d_begin; d < d_end; d += W) {
        const int64_t n = d_end - d;
        if constexpr (width == 0) walk_wide<E>(c, s, t, t_end, d, n);
        else if (n >= W) walk<E, width, true>(c, s, t, t_end, d, n);
        else walk<E, width, false>(c, s, t, t_end, d, n);
      }
    }
    if (!c.new_state || end < s.T) return;
    for (int64_t d = d_begin; d < d_end; d += W) {
      const int64_t n = d_end - d < W ? d_end - d : W;
      for (int64_t i = 1 - c.W; i < 0; ++i) scatter(c.new_state + s.in_state(c, i, d), c.W - 1, sample<E>(c, s, s.T + i, d, n), n);
    }
  });
}

template <class E>
auto unit_of(int64_t width) {
  switch (width) {
    case 2: return unit<E, 2>;
    case 3: return unit<E, 3>;
    case 4: return unit<E, 4>;
    default: return unit<E, 0>;
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1d& c, int64_t begin, int64_t end) {
  const auto run = c.x.type == DType::f32 ? unit_of<float>(c.W) : c.x.type == DType::bf16 ? unit_of<bf16>(c.W) : unit_of<f16>(c.W);
  each_unit(c, begin, end, [&](int64_t i, int64_t d, int64_t d_end) { run(c, i, d, d_end); });
}

}  // namespace pyseq::PYSEQ_ISA
