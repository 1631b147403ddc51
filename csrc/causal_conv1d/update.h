// What forward, backward and step share: one token of one vector of channels, hence their equal bits; and the walk over
// sequences.
#pragma once
#include "causal_conv1d/kernel.h"
#include "cpu/simd.h"

namespace pyseq::PYSEQ_ISA {

// bias first, then the taps from the oldest sample to the newest.
template <int width>
inline vf convolve(const vf (&weight)[width], const vf* window, vf a) {
  for (int k = 0; k < width; ++k) a = fma(weight[k], window[k], a);
  return a;
}

// At most n lanes of a state [.., D, W-1]: one sample of neighbouring channels lies `stride` apart.
template <class M>
inline vf gather(const M* state, int64_t stride, int64_t n) {
  M lane[W] = {};
  for (int64_t i = 0; i < W && i < n; ++i) lane[i] = state[i * stride];
  return load(lane);
}
template <class M>
inline void scatter(M* state, int64_t stride, vf v, int64_t n) {
  M lane[W];
  store(lane, v);
  for (int64_t i = 0; i < W && i < n; ++i) state[i * stride] = lane[i];
}

inline vf weight_at(const CausalConv1d& c, int64_t k, int64_t d, int64_t n) { return load(c.weight + k * c.D + d, n); }
inline vf bias_at(const CausalConv1d& c, int64_t d, int64_t n) { return c.bias ? load(c.bias + d, n) : vf{}; }

// One sequence: T tokens from row `first` on; t counts from its own beginning.
struct Sequence {
  int64_t index, first, T;

  template <class E> E* at(const CausalConv1d& c, const View& x, int64_t t, int64_t d) const {
    const int64_t row = c.cu_seqlens ? (first + t) * x.stride[1] : index * x.stride[0] + t * x.stride[1];
    return static_cast<E*>(x.data) + row + d;
  }
  // Where sample t < 0 of channel d stands in a [S, D, W-1] state.
  int64_t in_state(const CausalConv1d& c, int64_t t, int64_t d) const { return (index * c.D + d + 1) * (c.W - 1) + t; }
};

template <class E>
inline vf sample(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t d, int64_t n) {
  if (t >= 0) return load(s.at<E>(c, c.x, t, d), n);
  return c.state ? gather(c.state + s.in_state(c, t, d), c.W - 1, n) : vf{};
}

// a[t] for any width, every sample read from memory.
template <class E>
inline vf convolve_wide(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t d, int64_t n) {
  vf a = bias_at(c, d, n);
  for (int64_t k = 0; k < c.W; ++k) a = fma(weight_at(c, k, d, n), sample<E>(c, s, t - (c.W - 1) + k, d, n), a);
  return a;
}

// Adds dnew_state to dx[j] if j is among the last W-1 samples, and stores it where sample j lives: in dx or in dstate.
template <class E>
inline void store_dx(const CausalConv1dBackward& g, const Sequence& s, int64_t j, int64_t d, vf dx, int64_t n) {
  const CausalConv1d& c = g.forward;
  if (g.dnew_state && j >= s.T - (c.W - 1)) dx += gather(g.dnew_state + s.in_state(c, j - s.T, d), c.W - 1, n);
  if (j >= 0) store(s.at<E>(c, g.dx, j, d), dx, n);
  else if (g.dstate) scatter(g.dstate + s.in_state(c, j, d), c.W - 1, dx, n);
}

// f(sequence, begin, end) for every piece of a sequence that run number `run` holds. The end of a sequence is in
// exactly one run, that of an empty sequence too.
template <class F>
inline void each_piece(const CausalConv1d& c, int64_t run, F f) {
  const auto first_row = [&](int64_t s) { return c.cu_seqlens ? c.cu_seqlens[s] : s * c.T; };
  const int64_t total = c.B * c.T, begin = run * c.rows;
  const int64_t end = run + 1 < c.runs ? begin + c.rows : total;
  int64_t s = 0;
  for (int64_t high = c.S; s < high;) {   // the first sequence that ends after `begin` or starts no earlier
    const int64_t middle = (s + high) / 2;
    if (first_row(middle) >= begin || first_row(middle + 1) > begin) high = middle;
    else s = middle + 1;
  }
  for (; s < c.S && (first_row(s) < end || run + 1 == c.runs); ++s) {
    const Sequence q{s, first_row(s), first_row(s + 1) - first_row(s)};
    f(q, begin > q.first ? begin - q.first : 0, (end - q.first < q.T ? end - q.first : q.T));
  }
}

// f(run, d, d_end) for units [begin, end): channels [d, d_end) of a run.
template <class F>
inline void each_unit(const CausalConv1d& c, int64_t begin, int64_t end, F f) {
  const int64_t blocks = (c.D + kConvChannels - 1) / kConvChannels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t d = i % blocks * kConvChannels;
    f(i / blocks, d, d + kConvChannels < c.D ? d + kConvChannels : c.D);
  }
}

}  // namespace pyseq::PYSEQ_ISA
