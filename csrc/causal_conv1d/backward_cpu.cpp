#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kRows = 8;   // rows abreast, all loaded before the first store, as in the forward

template <int width>
inline vf dot_reversed(const vf (&weight)[width], const vf* e) {
  vf dx = weight[0] * e[width - 1];
  for (int k = 1; k < width; ++k) dx = fma(weight[k], e[width - 1 - k], dx);
  return dx;
}

// Tokens t .. t + rows - 1 of n channels from d on. `last` holds the e of the W-1 tokens before t, and then of the last
// W-1 here. own: the tokens count in the partial sums, and dx is stored W-1 rows back; else they only warm `last` up.
template <class E, int width, int rows, bool whole>
void tile(const CausalConv1dBackward& g, const Sequence& s, int64_t t, bool own, float* last, float* partial, int64_t d,
          int64_t n) {
  if constexpr (whole) n = W;
  const CausalConv1d& c = g.forward;
  vf weight[width], window[width - 1 + rows], e[width - 1 + rows];
  for (int k = 0; k < width; ++k) weight[k] = weight_at(c, k, d, n);
  for (int k = 0; k < width - 1; ++k) {
    window[k] = sample<E>(c, s, t - (width - 1) + k, d, n);
    e[k] = load(last + k * kConvChannels);
  }
  const vf bias = bias_at(c, d, n);
  const E* x = s.at<const E>(c, c.x, t, d);
  const E* dy = s.at<const E>(c, g.dy, t, d);
  for (int r = 0; r < rows; ++r) {
    window[width - 1 + r] = load(x + r * c.x.stride[1], n);
    e[width - 1 + r] = load(dy + r * g.dy.stride[1], n);
  }
  for (int r = rows; r < 2 * rows; ++r) {
    __builtin_prefetch(x + r * c.x.stride[1], 0, 2);
    __builtin_prefetch(dy + r * g.dy.stride[1], 0, 2);
  }
  if (c.silu) {
    for (int r = 0; r < rows; ++r) e[width - 1 + r] *= silu_grad(convolve(weight, window + r, bias));
  }
  for (int k = 0; k < width - 1; ++k) store(last + k * kConvChannels, e[rows + k]);
  if (!own) return;
  for (int k = 0; k <= width; ++k) {
    vf sum = {};
    for (int r = 0; r < rows; ++r) sum = k < width ? fma(e[width - 1 + r], window[r + k], sum) : sum + e[width - 1 + r];
    store(partial + k * c.D + d, load(partial + k * c.D + d, n) + sum, n);
  }
  const int64_t j = t - (width - 1);
  for (int r = 0; r < rows; ++r) {
    const vf dx = dot_reversed(weight, e + r);
    if (rows > 1 || j >= 0) store(s.at<E>(c, g.dx, j + r, d), dx, n);
    else store_dx<E>(g, s, j, d, dx, n);
  }
}

// dx of the last W-1 samples, once no token follows.
template <class E, int width>
void finish(const CausalConv1dBackward& g, const Sequence& s, const float* last, int64_t d, int64_t n) {
  vf weight[width], e[width] = {};
  for (int k = 0; k < width; ++k) weight[k] = weight_at(g.forward, k, d, n);
  for (int k = 0; k + 1 < width; ++k) e[k] = load(last + k * kConvChannels);
  for (int i = 0; i + 1 < width; ++i) {
    store_dx<E>(g, s, s.T - (width - 1) + i, d, dot_reversed(weight, e), n);
    for (int k = 0; k + 1 < width; ++k) e[k] = e[k + 1];
  }
}

template <class E, int width>
void unit(const CausalConv1dBackward& g, int64_t run, int64_t d_begin, int64_t d_end) {
  const CausalConv1d& c = g.forward;
  float* partial = g.partial + run * (width + 1) * c.D;
  for (int64_t k = 0; k <= width; ++k) {
    for (int64_t d = d_begin; d < d_end; ++d) partial[k * c.D + d] = 0.f;
  }
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    alignas(64) float last[width * kConvChannels] = {};
    const int64_t warm = begin > width - 1 ? begin - (width - 1) : 0;
    for (int64_t t = warm, rows; t < end; t += rows) {
      rows = t >= begin && t >= width - 1 && t + kRows <= end ? kRows : 1;
      for (int64_t d = d_begin; d < d_end; d += W) {
        const int64_t n = d_end - d;
        if (rows == 1) tile<E, width, 1, false>(g, s, t, t >= begin, last + (d - d_begin), partial, d, n);
        else if (n >= W) tile<E, width, kRows, true>(g, s, t, true, last + (d - d_begin), partial, d, n);
        else tile<E, width, kRows, false>(g, s, t, true, last + (d - d_begin), partial, d, n);
      }
    }
    if (end < s.T) return;
    for (int64_t d = d_begin; d < d_end; d += W) finish<E, width>(g, s, last + (d - d_begin), d, d_end - d);
  });
}

template <class E>
auto unit_of(int64_t width) {
  switch (width) {
    case 1: return unit<E, 1>;
    case 2: return unit<E, 2>;
    case 3: return unit<E, 3>;
    default: return unit<E, 4>;
  }
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dBackward& g, int64_t begin, int64_t end) {
  const CausalConv1d& c = g.forward;
  const auto run = c.x.type == DType::f32    ? unit_of<float>(c.W)
                   : c.x.type == DType::bf16 ? unit_of<bf16>(c.W)
                                             : unit_of<f16>(c.W);
  each_unit(c, begin, end, [&](int64_t i, int64_t d, int64_t d_end) { run(g, i, d, d_end); });
}

void causal_conv1d_backward_sum(const CausalConv1dBackward& g, int64_t begin, int64_t end) {
  const CausalConv1d& c = g.forward;
  const int64_t d_end = end * kConvChannels < c.D ? end * kConvChannels : c.D;
  for (int64_t d = begin * kConvChannels; d < d_end; d += W) {
    const int64_t n = d_end - d < W ? d_end - d : W;
    for (int64_t k = 0; k <= c.W; ++k) {
      vf sum = {};
      for (int64_t run = 0; run < c.runs; ++run) sum += load(g.partial + (run * (c.W + 1) + k) * c.D + d, n);
      if (k < c.W) scatter(g.dweight + d * c.W + k, c.W, sum, n);
      else if (g.dbias) store(g.dbias + d, sum, n);
    }
  }
}

}  // namespace pyseq::PYSEQ_ISA
