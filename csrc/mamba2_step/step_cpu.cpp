#include "cpu/simd.h"
#include "mamba2_step/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

template <class T> vf gather(const T* p, int64_t stride, int64_t lanes) {
  T lane[W] = {};
  for (int64_t i = 0; i < lanes; ++i) lane[i] = p[i * stride];
  return load(lane);
}
vf gather(const View& x, int64_t at, int64_t stride, int64_t lanes) {
  switch (x.type) {
    case DType::bf16: return gather(static_cast<const bf16*>(x.data) + at, stride, lanes);
    case DType::f16: return gather(static_cast<const f16*>(x.data) + at, stride, lanes);
    default: return gather(static_cast<const float*>(x.data) + at, stride, lanes);
  }
}
float number(const View& x, int64_t i) { return load(x, i, 1)[0]; }

// W neighbouring channels of a row: the bias, then the taps from the oldest sample on, which move on by one.
template <class M> void convolve(const Mamba2Step& s, int64_t row, int64_t channel, int64_t lanes) {
  const int64_t stride = s.conv_state.stride[1], taps = s.conv_weight.stride[0];
  M* const state = static_cast<M*>(s.conv_state.data) + row * s.conv_state.stride[0] + channel * stride;
  vf a = s.conv_bias ? load(s.conv_bias, channel, lanes) : vf{};
  for (int64_t k = 0; k < s.taps; ++k) {
    M sample[W] = {};
    vf v;
    if (k + 1 < s.taps) {
      for (int64_t i = 0; i < lanes; ++i) sample[i] = state[i * stride + k];
      v = load(sample);
    } else {
      v = load(s.xBC, row * s.xBC.stride[0] + channel, lanes);
      store(sample, v);
    }
    for (int64_t i = 0; k > 0 && i < lanes; ++i) state[i * stride + k - 1] = sample[i];
    a = fma(gather(s.conv_weight, channel * taps + k, taps, lanes), v, a);
  }
  store(s.convolved + row * s.channels() + channel, silu(a), lanes);
}

// The states of a row of S lie side by side, so they are the lanes.
template <class T> void advance(const Mamba2Step& s, int64_t row, int64_t head) {
  const float* const convolved = s.convolved + row * s.channels();
  const float* const x = convolved + head * s.width;
  const float* const B = convolved + s.dim() + head / (s.heads / s.groups) * s.states;
  const float* const C = B + s.groups * s.states;
  float delta = softplus(splat(number(s.dt, row * s.dt.stride[0] + head) + number(s.dt_bias, head)))[0];
  delta = delta < s.dt_low ? s.dt_low : delta;   // NaN stays NaN
  delta = delta > s.dt_high ? s.dt_high : delta;
  const float A = number(s.A, head), log_decay = delta * A < kMamba2Least ? kMamba2Least : delta * A;
  const vf a = A <= 0.f ? exp(splat(log_decay)) : splat(NAN);
  T* const state = static_cast<T*>(s.state.data) + row * s.state.stride[0] + head * s.state.stride[1];
  float* const v = s.v + row * s.dim() + head * s.width;
  for (int64_t p = 0; p < s.width; ++p) {
    T* const at = state + p * s.state.stride[2];
    const vf dx = splat(delta * x[p]);
    vf y{};
    for (int64_t n = 0; n < s.states; n += W) {
      const vf S = fma(a, load(at + n, s.states - n), dx * load(B + n, s.states - n));
      store(at + n, S, s.states - n);
      y = fma(S, load(C + n, s.states - n), y);   // a NaN in lanes behind N is one of a, and so of all
    }
    v[p] = sum(y);
  }
  for (int64_t p = 0; p < s.width; p += W) {
    const int64_t lanes = s.width - p, channel = head * s.width + p;
    const vf skip = s.skip_wide ? load(s.skip, head * s.skip.stride[0] + p, lanes) : splat(number(s.skip, head));
    vf u = fma(skip, load(x + p, lanes), load(v + p, lanes));
    if (s.gates_first()) u *= silu(load(s.z, row * s.z.stride[0] + channel, lanes));
    if (s.norm_group) store(v + p, u, lanes);
    else store(s.y, row * s.y.stride[0] + channel, u, lanes);
  }
}

void normalise(const Mamba2Step& s, int64_t row, int64_t first) {
  const float* const v = s.v + row * s.dim();
  const int64_t end = first + s.norm_group;
  vf squares{};
  for (int64_t d = first; d < end; d += W) {
    const vf u = load(v + d, end - d);
    squares = fma(u, u, squares);
  }
  const float scale = 1.f / std::sqrt(sum(squares) / float(s.norm_group) + s.eps);
  for (int64_t d = first; d < end; d += W) {
    vf y = load(v + d, end - d) * scale * load(s.norm_weight, d, end - d);
    if (s.z && s.norm_before_gate) y *= silu(load(s.z, row * s.z.stride[0] + d, end - d));
    store(s.y, row * s.y.stride[0] + d, y, end - d);
  }
}

}  // namespace

int64_t mamba2_step_tiles(int64_t channels) { return (channels + W - 1) / W; }

void mamba2_step_convolve(const Mamba2Step& s, int64_t begin, int64_t end) {
  const int64_t tiles = mamba2_step_tiles(s.channels());
  const auto f = s.conv_state.type == DType::f32 ? convolve<float> : convolve<bf16>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t channel = i % tiles * W;
    f(s, i / tiles, channel, channel + W <= s.channels() ? W : s.channels() - channel);
  }
}

void mamba2_step(const Mamba2Step& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  const auto f = s.state.type == DType::f32 ? advance<float> : advance<bf16>;
  for (int64_t i = begin; i < end; ++i) f(s, i / s.heads, i % s.heads);
  restore_denormals(denormals);
}

void mamba2_step_finish(const Mamba2Step& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < s.dim(); first += s.norm_group) normalise(s, row, first);
  }
}

}  // namespace pyseq::PYSEQ_ISA
