#include "cpu/simd.h"
#include "mamba_step/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// W neighbouring channels of one row of the batch, or the fewer that are left: the lanes of a vector.
struct Tile { int64_t row, channel, lanes; };

Tile tile_at(const MambaStep& s, int64_t i) {
  const int64_t tiles = mamba_step_tiles(s.dim), channel = i % tiles * W;
  return {i / tiles, channel, channel + W <= s.dim ? W : s.dim - channel};
}

vf gather(const View& x, int64_t at, int64_t stride, int64_t lanes) {
  vf v{};
  for (int64_t i = 0; i < lanes; ++i) v[i] = load(x, at + i * stride, 1)[0];
  return v;
}

template <class T> void convolve(const MambaStep& s, const Tile& tile) {
  const auto [row, channel, lanes] = tile;
  const int64_t stride = s.conv_state.stride[1];
  T* const state = static_cast<T*>(s.conv_state.data) + row * s.conv_state.stride[0] + channel * stride;
  vf a = s.conv_bias ? load(s.conv_bias, channel, lanes) : vf{};
  for (int64_t k = 0; k < s.width; ++k) {
    T sample[W] = {};
    vf v;
    if (k + 1 < s.width) {
      for (int64_t i = 0; i < lanes; ++i) sample[i] = state[i * stride + k];
      v = load(sample);
    } else {
      v = load(s.x, row * s.x.stride[0] + channel, lanes);
      store(sample, v);
    }
    a = fma(gather(s.conv_weight, channel * s.conv_weight.stride[0] + k, s.conv_weight.stride[0], lanes), v, a);
    for (int64_t i = 0; k > 0 && i < lanes; ++i) state[i * stride + k - 1] = sample[i];
  }
  store(s.u + row * s.dim + channel, silu(a), lanes);
}

// Four outputs of up to four rows of the batch: sixteen sums at a time, each vector of the weight read once.
template <class T> void project(const MambaStep& s, int64_t first) {
  constexpr int kOut = 4, kRows = 4;
  const int64_t outputs = s.outputs();
  const T* weight[kOut];
  for (int64_t o = 0; o < kOut; ++o) {   // behind the last output the last one again, not stored
    const int64_t output = first + o < outputs ? first + o : outputs - 1;
    weight[o] = static_cast<const T*>(s.x_proj.data) + output * s.x_proj.stride[0];
  }
  for (int64_t b = 0; b < s.batch; b += kRows) {
    const int64_t rows = s.batch - b < kRows ? s.batch - b : kRows;
    vf total[kOut][kRows] = {};
    const auto add = [&](int64_t d, int64_t lanes, int64_t n) {
      vf w[kOut];
      for (int o = 0; o < kOut; ++o) w[o] = load(weight[o] + d, lanes);
      for (int64_t r = 0; r < n; ++r) {
        const vf u = load(s.u + (b + r) * s.dim + d, lanes);
        for (int o = 0; o < kOut; ++o) total[o][r] = fma(w[o], u, total[o][r]);
      }
    };
    const int64_t whole = s.dim / W * W;
    if (rows == kRows) {
      for (int64_t d = 0; d < whole; d += W) add(d, W, kRows);
    } else if (rows == 1) {
      for (int64_t d = 0; d < whole; d += W) add(d, W, 1);
    } else {
      for (int64_t d = 0; d < whole; d += W) add(d, W, rows);
    }
    if (whole < s.dim) add(whole, s.dim - whole, rows);
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = s.projected + (b + r) * outputs + first;
      for (int64_t o = 0; o < kOut && first + o < outputs; ++o) to[o] = sum(total[o][r]);
    }
  }
}

// W_dt low, for the channels of a tile: one sum per channel, then the lanes of all of them at once.
vf low_rank(const MambaStep& s, const Tile& tile, const float* low) {
  vf part[W] = {};
  for (int64_t r = 0; r < s.rank; r += W) {
    const int64_t n = s.rank - r;
    const vf l = load(low + r, n);
    for (int64_t i = 0; i < tile.lanes; ++i) {
      part[i] = fma(load(s.dt_proj, (tile.channel + i) * s.dt_proj.stride[0] + r, n), l, part[i]);
    }
  }
  transpose(part);
  vf total = part[0];
  for (int i = 1; i < W; ++i) total += part[i];
  return total;
}

// The states of a channel lie side by side, so here they are the lanes; <C, h> is summed with the channels there.
template <class T> void advance(const MambaStep& s, const Tile& tile) {
  const auto [row, channel, lanes] = tile;
  const float* const low = s.projected + row * s.outputs();
  const float *const B = low + s.rank, *const C = B + s.states;
  const vf u = load(s.u + row * s.dim + channel, lanes);
  const vf delta = softplus(low_rank(s, tile, low) + load(s.dt_bias, channel, lanes));
  alignas(64) float delta_of[W], du_of[W];
  store(delta_of, delta);
  store(du_of, delta * u);
  T* const state = static_cast<T*>(s.state.data) + row * s.state.stride[0] + channel * s.state.stride[1];
  vf y = load(s.skip, channel, lanes) * u;
  for (int64_t n = 0; n < s.states; n += W) {
    const int64_t left = s.states - n;
    const vf at_n = load(B + n, left);
    vf h[W] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      T* const here = state + i * s.state.stride[1] + n;
      const vf A = load(s.A, (channel + i) * s.A.stride[0] + n, left) * kLog2e;
      h[i] = fma(exp2(delta_of[i] * A), load(here, left), du_of[i] * at_n);
      store(here, h[i], left);
    }
    transpose(h);
    for (int64_t k = 0; k < W && k < left; ++k) y = fma(h[k], C[n + k], y);
  }
  store(s.y, row * s.y.stride[0] + channel, y * silu(load(s.z, row * s.z.stride[0] + channel, lanes)), lanes);
}

void normalise(float* v, int64_t size, float eps) {
  vf squares{};
  for (int64_t i = 0; i < size; i += W) {
    const vf at = load(v + i, size - i);
    squares = fma(at, at, squares);
  }
  const float scale = 1.f / std::sqrt(sum(squares) / float(size) + eps);
  for (int64_t i = 0; i < size; i += W) store(v + i, load(v + i, size - i) * scale, size - i);
}

}  // namespace

int64_t mamba_step_tiles(int64_t dim) { return (dim + W - 1) / W; }

void mamba_step_convolve(const MambaStep& s, int64_t begin, int64_t end) {
  const auto f = s.conv_state.type == DType::f32 ? convolve<float> : convolve<bf16>;
  for (int64_t i = begin; i < end; ++i) f(s, tile_at(s, i));
}

void mamba_step_project(const MambaStep& s, int64_t begin, int64_t end) {
  const DType type = s.x_proj.type;
  const auto f = type == DType::f32 ? project<float> : type == DType::bf16 ? project<bf16> : project<f16>;
  for (int64_t i = begin; i < end; ++i) f(s, 4 * i);
}

void mamba_step_normalise(const MambaStep& s, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    float* const low = s.projected + b * s.outputs();
    normalise(low, s.rank, s.eps);
    normalise(low + s.rank, s.states, s.eps);
    normalise(low + s.rank + s.states, s.states, s.eps);
  }
}

void mamba_step(const MambaStep& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  const auto f = s.state.type == DType::f32 ? advance<float> : advance<bf16>;
  for (int64_t i = begin; i < end; ++i) f(s, tile_at(s, i));
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
