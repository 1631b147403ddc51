#include "selective_scan/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// The states of a channel lie side by side, so here they are the lanes, and only <C, h> needs the channels there: the sum
// over states runs in the order of the sequence kernel, which makes the two agree bit for bit.
template <class T>
void step_tile(const SelectiveScanStep& s, int64_t b, const Tile& tile) {
  const int64_t channel = tile.channel, lanes = tile.lanes;
  const auto row = [&](const View& x) { return load(x, b * x.stride[0] + channel, lanes); };
  const vf u = row(s.u), raw = row(s.dt) + load_or(s.dt_bias, channel, lanes, 0.f);
  const vf delta = s.dt_softplus ? softplus(raw) : raw;
  alignas(64) float delta_of[W], du_of[W];
  store(delta_of, delta);
  store(du_of, delta * u);
  T* const state = static_cast<T*>(s.state.data) + b * s.state.stride[0] + channel * s.state.stride[1];
  vf y{};
  for (int64_t n = 0; n < s.states; n += W) {
    const int64_t left = s.states - n;
    const vf B = load(s.B, b * s.B.stride[0] + tile.group * s.B.stride[1] + n, left);
    alignas(64) float C[W];
    store(C, load(s.C, b * s.C.stride[0] + tile.group * s.C.stride[1] + n, left));
    vf h[W] = {};
    const auto advance_channels = [&](int64_t channels, int64_t states) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < channels; ++i) {
        T* const at_i = state + i * s.state.stride[1] + n;
        const vf A = load(s.A + (channel + i) * s.states + n, states) * kLog2e;
        h[i] = next(decay(splat(delta_of[i]), A), load(at_i, states), splat(du_of[i]), B);
        store(at_i, h[i], states);
      }
    };
    lanes == W && left >= W ? advance_channels(W, W) : advance_channels(lanes, left);
    transpose(h);
    for (int64_t k = 0; k < W && k < left; ++k) y = fma(h[k], splat(C[k]), y);
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
