#include "ssd/update.h"

namespace pyseq::PYSEQ_ISA {

void ssd_step(const SsdStep& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / s.heads, h = unit % s.heads, g = h / (s.heads / s.groups);
    const float delta = step_size(s, load_one(s.dt, b * s.dt.stride[0] + h), h);
    const vf a = exp(splat(log_decay(delta, s.A[h])));
    const int64_t B = b * s.B.stride[0] + g * s.B.stride[1], C = b * s.C.stride[0] + g * s.C.stride[1];
    for (int64_t p = 0; p < s.width; ++p) {
      const float x = load_one(s.x, b * s.x.stride[0] + h * s.x.stride[1] + p);
      const int64_t row = b * s.state.stride[0] + h * s.state.stride[1] + p * s.state.stride[2];
      vf total{};
      for (int64_t n = 0; n < s.states; n += W) {
        const int64_t left = s.states - n;
        const vf S = fma(a, load(s.state, row + n, left), splat(delta * x) * load(s.B, B + n, left));
        store(s.state, row + n, S, left);
        total = fma(S, load(s.C, C + n, left), total);
      }
      float y = sum(total);
      if (s.D) y += s.D[h * s.D_width + (s.D_width > 1 ? p : 0)] * x;
      if (s.z) y *= silu(splat(load_one(s.z, b * s.z.stride[0] + h * s.z.stride[1] + p)))[0];
      store(s.y, b * s.y.stride[0] + h * s.y.stride[1] + p, splat(y), 1);
    }
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
