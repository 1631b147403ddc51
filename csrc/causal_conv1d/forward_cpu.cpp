#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// Rows abreast. All their samples are loaded before the first y is stored: x and y often lie a multiple of 4096 bytes
// apart, and a load behind a store whose address ends in the same 12 bits waits for it.
constexpr int kRows = 8;

// Tokens t .. t + rows - 1 of n channels from d on.
template <class E, int width, int rows, bool whole>
void tile(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t d, int64_t n) {
  if constexpr (whole) n = W;
  vf weight[width], window[width - 1 + rows], a[rows];
  for (int k = 0; k < width; ++k) weight[k] = weight_at(c, k, d, n);
  for (int k = 0; k < width - 1; ++k) window[k] = sample<E>(c, s, t - (width - 1) + k, d, n);
  const vf bias = bias_at(c, d, n);
  const E* x = s.at<const E>(c, c.x, t, d);
  E* y = s.at<E>(c, c.y, t, d);
  for (int r = 0; r < rows; ++r) window[width - 1 + r] = load(x + r * c.x.stride[1], n);
  // The next sweep's rows are no stream that the hardware foresees. A prefetch past the end does not fault.
  for (int r = rows; r < 2 * rows; ++r) {
    __builtin_prefetch(x + r * c.x.stride[1], 0, 2);
    __builtin_prefetch(y + r * c.y.stride[1], 1, 2);
  }
  for (int r = 0; r < rows; ++r) a[r] = convolve(weight, window + r, bias);
  for (int r = 0; r < rows; ++r) store(y + r * c.y.stride[1], c.silu ? silu(a[r]) : a[r], n);
}

template <class E>
void tile_wide(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t rows, int64_t d, int64_t n) {
  for (const int64_t end = t + rows; t < end; ++t) {
    const vf a = convolve_wide<E>(c, s, t, d, n);
    store(s.at<E>(c, c.y, t, d), c.silu ? silu(a) : a, n);
  }
}

template <class E, int width>
void unit(const CausalConv1d& c, int64_t run, int64_t d_begin, int64_t d_end) {
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t t = begin, rows; t < end; t += rows) {
      rows = t + kRows <= end ? kRows : 1;
      for (int64_t d = d_begin; d < d_end; d += W) {
        const int64_t n = d_end - d;
        if constexpr (width == 0) tile_wide<E>(c, s, t, rows, d, n);
        else if (rows == 1) tile<E, width, 1, false>(c, s, t, d, n);
        else if (n >= W) tile<E, width, kRows, true>(c, s, t, d, n);
        else tile<E, width, kRows, false>(c, s, t, d, n);
      }
    }
    if (!c.new_state || end < s.T) return;
    for (int64_t d = d_begin; d < d_end; d += W) {
      const int64_t n = d_end - d;
      for (int64_t i = 1 - c.W; i < 0; ++i) {
        scatter(c.new_state + s.in_state(c, i, d), c.W - 1, sample<E>(c, s, s.T + i, d, n), n);
      }
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
  const auto run = c.x.type == DType::f32    ? unit_of<float>(c.W)
                   : c.x.type == DType::bf16 ? unit_of<bf16>(c.W)
                                             : unit_of<f16>(c.W);
  each_unit(c, begin, end, [&](int64_t i, int64_t d, int64_t d_end) { run(c, i, d, d_end); });
}

}  // namespace pyseq::PYSEQ_ISA
