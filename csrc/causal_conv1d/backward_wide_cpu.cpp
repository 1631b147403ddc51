// Any width, in two passes: e to memory, then dx and the partial sums from it.
#include "causal_conv1d/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

template <class E>
void e_of_run(const CausalConv1dBackward& g, int64_t run, int64_t d_begin, int64_t d_end) {
  const CausalConv1d& c = g.forward;
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t d = d_begin; d < d_end; d += W) {
        const int64_t n = d_end - d;
        vf e = load(s.at<const E>(c, g.dy, t, d), n);
        if (c.silu) e *= silu_grad(convolve_wide<E>(c, s, t, d, n));
        store(g.e + (s.first + t) * c.D + d, e, n);
      }
    }
  });
}

template <class E>
void dx_at(const CausalConv1dBackward& g, const Sequence& s, int64_t j, int64_t d, int64_t n) {
  const CausalConv1d& c = g.forward;
  const int64_t newest = j + c.W - 1;   // the last token that sees sample j
  vf dx = {};
  for (int64_t k = newest < s.T ? 0 : newest - s.T + 1; k < c.W && k <= newest; ++k) {
    dx = fma(weight_at(c, k, d, n), load(g.e + (s.first + newest - k) * c.D + d, n), dx);
  }
  store_dx<E>(g, s, j, d, dx, n);
}

template <class E>
void run_of(const CausalConv1dBackward& g, int64_t run, int64_t d_begin, int64_t d_end) {
  const CausalConv1d& c = g.forward;
  float* partial = g.partial + run * (c.W + 1) * c.D;
  for (int64_t k = 0; k <= c.W; ++k) {
    for (int64_t d = d_begin; d < d_end; ++d) partial[k * c.D + d] = 0.f;
  }
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t d = d_begin; d < d_end; d += W) {
      const int64_t n = d_end - d < W ? d_end - d : W;
      for (int64_t j = begin == 0 ? 1 - c.W : begin; j < end; ++j) dx_at<E>(g, s, j, d, n);
      for (int64_t k = 0; k <= c.W; ++k) {
        vf sum = load(partial + k * c.D + d, n);
        for (int64_t t = begin; t < end; ++t) {
          const vf e = load(g.e + (s.first + t) * c.D + d, n);
          sum = k == c.W ? sum + e : fma(e, sample<E>(c, s, t - (c.W - 1) + k, d, n), sum);
        }
        store(partial + k * c.D + d, sum, n);
      }
    }
  });
}

}  // namespace

void causal_conv1d_backward_e(const CausalConv1dBackward& g, int64_t begin, int64_t end) {
  const DType type = g.forward.x.type;
  const auto f = type == DType::f32 ? e_of_run<float> : type == DType::bf16 ? e_of_run<bf16> : e_of_run<f16>;
  each_unit(g.forward, begin, end, [&](int64_t run, int64_t d, int64_t d_end) { f(g, run, d, d_end); });
}

void causal_conv1d_backward_wide(const CausalConv1dBackward& g, int64_t begin, int64_t end) {
  const DType type = g.forward.x.type;
  const auto f = type == DType::f32 ? run_of<float> : type == DType::bf16 ? run_of<bf16> : run_of<f16>;
  each_unit(g.forward, begin, end, [&](int64_t run, int64_t d, int64_t d_end) { f(g, run, d, d_end); });
}

}  // namespace pyseq::PYSEQ_ISA
