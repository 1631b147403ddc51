#include "ssd/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kRows = 4;   // channels at a time: they share a vector of B and C

// Channels [0, R) of S, `stride` apart, one token on; total[i] = their parts of <C, S>.
template <bool slow, int R, class T>
inline void advance(const SsdStep& s, T* S, int64_t stride, int64_t B, int64_t C, vf decay, const float* dx,
                    vf* total) {
  vf sum[R] = {};
  for (int64_t n = 0; n < s.states; n += W) {
    const int64_t left = s.states - n;
    const vf b = load(s.B, B + n, left), c = load(s.C, C + n, left);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* const at = S + r * stride + n;
      const vf v = next<slow>(decay, load(at, left), splat(dx[r]), b);
      store(at, v, left);
      sum[r] = fma(v, c, sum[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = sum[r];
}

template <bool slow, class T> void step_head(const SsdStep& s, int64_t b, int64_t h, vf delta, vf log_a) {
  const int64_t g = h / (s.heads / s.groups);
  const vf left = decay_of(log_a);
  const int64_t B = b * s.B.stride[0] + g * s.B.stride[1], C = b * s.C.stride[0] + g * s.C.stride[1];
  const int64_t x_at = b * s.x.stride[0] + h * s.x.stride[1], z_at = b * s.z.stride[0] + h * s.z.stride[1];
  const int64_t y_at = b * s.y.stride[0] + h * s.y.stride[1], stride = s.state.stride[2];
  T* const state = static_cast<T*>(s.state.data) + b * s.state.stride[0] + h * s.state.stride[1];
  for (int64_t p = 0; p < s.width; p += W) {
    const int64_t rows = s.width - p < W ? s.width - p : W;
    const vf x = load(s.x, x_at + p, rows);
    alignas(64) float dx[W];
    store(dx, delta * x);
    vf total[W] = {};
    int64_t r = 0;
    T* const S = state + p * stride;
    for (; r + kRows <= rows; r += kRows) {
      advance<slow, kRows>(s, S + r * stride, stride, B, C, left, dx + r, total + r);
    }
    for (; r < rows; ++r) advance<slow, 1>(s, S + r * stride, stride, B, C, left, dx + r, total + r);
    store(s.y, y_at + p, output(s, sum_rows(total), x, z_at + p, h, p), rows);
  }
}

template <class T> void step_head(const SsdStep& s, int64_t b, int64_t h) {
  const vf bias = splat(s.dt_bias ? s.dt_bias[h] : 0.f), dt = splat(load(s.dt, b * s.dt.stride[0] + h, 1)[0]);
  const vf delta = step_size(s, dt, bias), log_a = log_decay(delta, splat(s.A[h]));
  is_slow(log_a)[0] ? step_head<true, T>(s, b, h, delta, log_a) : step_head<false, T>(s, b, h, delta, log_a);
}

}  // namespace

void ssd_step(const SsdStep& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / s.heads, h = unit % s.heads;
    s.state.type == DType::f32 ? step_head<float>(s, b, h) : step_head<bf16>(s, b, h);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
