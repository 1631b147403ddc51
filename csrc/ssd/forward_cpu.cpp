#include <algorithm>

#include "ssd/update.h"

namespace pyseq::PYSEQ_ISA {

int64_t ssd_forward_units(const Ssd& s) { return s.sequences * s.heads; }
int64_t ssd_forward_scratch(const Ssd& s) { return s.width * s.states; }

void ssd_forward(const Ssd& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t q = unit / s.heads, h = unit % s.heads, g = h / (s.heads / s.groups), b = s.cu_seqlens ? 0 : q;
    const int64_t first = s.cu_seqlens ? s.cu_seqlens[q] : 0, last = s.cu_seqlens ? s.cu_seqlens[q + 1] : s.time;
    const int64_t size = s.width * s.states;
    float* const S = s.scratch;
    if (s.state) std::copy_n(s.state + (q * s.heads + h) * size, size, S);
    else std::fill_n(S, size, 0.f);
    for (int64_t t = first; t < last; ++t) {
      const float delta = step_size(s, load_one(s.dt, b * s.dt.stride[0] + t * s.dt.stride[1] + h), h);
      const vf a = exp(splat(log_decay(delta, s.A[h])));
      const int64_t B = b * s.B.stride[0] + t * s.B.stride[1] + g * s.B.stride[2];
      const int64_t C = b * s.C.stride[0] + t * s.C.stride[1] + g * s.C.stride[2];
      for (int64_t p = 0; p < s.width; ++p) {
        const float x = load_one(s.x, b * s.x.stride[0] + t * s.x.stride[1] + h * s.x.stride[2] + p);
        vf total{};
        for (int64_t n = 0; n < s.states; n += W) {
          const int64_t left = s.states - n;
          const vf next = fma(a, load(S + p * s.states + n, left), splat(delta * x) * load(s.B, B + n, left));
          store(S + p * s.states + n, next, left);
          total = fma(next, load(s.C, C + n, left), total);
        }
        float y = sum(total);
        if (s.D) y += s.D[h * s.D_width + (s.D_width > 1 ? p : 0)] * x;
        if (s.z) y *= silu(splat(load_one(s.z, b * s.z.stride[0] + t * s.z.stride[1] + h * s.z.stride[2] + p)))[0];
        store(s.y, b * s.y.stride[0] + t * s.y.stride[1] + h * s.y.stride[2] + p, splat(y), 1);
      }
    }
    if (s.state_out) std::copy_n(S, size, s.state_out + (q * s.heads + h) * size);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
