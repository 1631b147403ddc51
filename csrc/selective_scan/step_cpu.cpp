#include "selective_scan/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

template <class T>
void step_tile(const SelectiveScanStep& s, int64_t b, const Tile& tile) {
  const auto [channel, lanes, group] = tile;
  const auto row = [&](const View& x) { return load(x, b * x.stride[0] + channel, lanes); };
  const vf u = row(s.u), raw = row(s.dt) + load_or(s.dt_bias, channel, lanes, 0.f);
  const vf delta = s.dt_softplus ? softplus(raw) : raw, du = delta * u;
  T* const state = static_cast<T*>(s.state.data) + b * s.state.stride[0] + channel * s.state.stride[1];
  vf y{};
  for (int64_t n = 0; n < s.states; n += W) {
    alignas(64) float A[W * W], B[W], C[W];
    vf h[W];
    load_states(h, s.A + channel * s.states, s.states, s.states, lanes, n);
    for (int i = 0; i < W; ++i) store(A + i * W, h[i] * kLog2e);
    load_states(h, state, s.state.stride[1], s.states, lanes, n);
    store(B, load(s.B, b * s.B.stride[0] + group * s.B.stride[1] + n, s.states - n));
    store(C, load(s.C, b * s.C.stride[0] + group * s.C.stride[1] + n, s.states - n));
    if (n + W <= s.states) {
      y = advance(h, A, B, C, delta, du, y);
    } else {
      for (int64_t i = 0; n + i < s.states; ++i) {
        vf one[1] = {h[i]};
        y = advance(one, A + i * W, B + i, C + i, delta, du, y);
        h[i] = one[0];
      }
    }
    store_states(state, s.state.stride[1], h, s.states, lanes, n);
  }
  if (s.D) y = fma(load(s.D + channel, lanes), u, y);
  store(s.y, b * s.y.stride[0] + channel, s.z ? y * silu(row(s.z)) : y, lanes);
}

}  // namespace

void selective_scan_step(const SelectiveScanStep& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  const int64_t per_row = tiles_of_group(s.dim, s.groups) * s.groups;
  for (int64_t i = begin; i < end; ++i) {
    const Tile tile = tile_at(s.dim, s.groups, i % per_row);
    s.state.type == DType::f32 ? step_tile<float>(s, i / per_row, tile) : step_tile<bf16>(s, i / per_row, tile);
  }
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
