#include "cpu/simd.h"
#include "mamba_step/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// W neighbouring channels, or the fewer that are left, from a row of the batch on: the lanes of a vector.
struct Tile { int64_t row, channel, lanes; };

Tile tile_at(const MambaStep& s, int64_t i, int64_t rows) {
  const int64_t tiles = mamba_step_tiles(s.dim), channel = i % tiles * W;
  return {i / tiles * rows, channel, channel + W <= s.dim ? W : s.dim - channel};
}

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

// A tile of every row, a tap at a time: the taps are gathered once, and u holds the sums meanwhile.
template <class T> void convolve(const MambaStep& s, const Tile& tile) {
  const auto [_, channel, lanes] = tile;
  const int64_t stride = s.conv_state.stride[1], taps = s.conv_weight.stride[0];
  const vf bias = s.conv_bias ? load(s.conv_bias, channel, lanes) : vf{};
  for (int64_t k = 0; k < s.width; ++k) {
    const vf weight = gather(s.conv_weight, channel * taps + k, taps, lanes);
    for (int64_t b = 0; b < s.batch; ++b) {
      T* const state = static_cast<T*>(s.conv_state.data) + b * s.conv_state.stride[0] + channel * stride;
      float* const u = s.u + b * s.dim + channel;
      T sample[W] = {};
      vf v;
      if (k + 1 < s.width) {
        for (int64_t i = 0; i < lanes; ++i) sample[i] = state[i * stride + k];
        v = load(sample);
      } else {
        v = load(s.x, b * s.x.stride[0] + channel, lanes);
        store(sample, v);
      }
      for (int64_t i = 0; k > 0 && i < lanes; ++i) state[i * stride + k - 1] = sample[i];
      const vf a = fma(weight, v, k == 0 ? bias : load(u, lanes));
      store(u, k + 1 < s.width ? a : silu(a), lanes);
    }
  }
}

constexpr int kRows = 4;   // of the batch, that share what is read of a weight

// Four outputs of up to four rows of the batch: sixteen sums at a time, each vector of the weight read once.
template <class T> void project(const MambaStep& s, int64_t first) {
  constexpr int kOut = 4;
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

// W_dt low, for the channels of a tile in n rows, each row of W_dt read once. Behind the last row the last one again.
template <int n> void low_rank(const MambaStep& s, const Tile& tile, vf* total) {
  const float* low[n];
  for (int b = 0; b < n; ++b) {
    low[b] = s.projected + (tile.row + b < s.batch ? tile.row + b : s.batch - 1) * s.outputs();
  }
  vf part[n][W];
  for (int64_t i = 0; i < W; ++i) {   // behind the last channel too, whose sum is not used
    const int64_t at = (tile.channel + (i < tile.lanes ? i : tile.lanes - 1)) * s.dt_proj.stride[0];
    vf sum[n] = {};
    for (int64_t r = 0; r < s.rank; r += W) {
      const vf w = load(s.dt_proj, at + r, s.rank - r);
      for (int b = 0; b < n; ++b) sum[b] = fma(w, load(low[b] + r, s.rank - r), sum[b]);
    }
    for (int b = 0; b < n; ++b) part[b][i] = sum[b];
  }
  for (int b = 0; b < n; ++b) {
    transpose(part[b]);
    total[b] = part[b][0];
    for (int i = 1; i < W; ++i) total[b] += part[b][i];
  }
}

// The states of a channel lie side by side, so here they are the lanes; <C, h> is summed with the channels there.
template <class T> void advance(const MambaStep& s, const Tile& tile, vf dt) {
  const auto [row, channel, lanes] = tile;
  const float *const B = s.projected + row * s.outputs() + s.rank, *const C = B + s.states;
  const vf u = load(s.u + row * s.dim + channel, lanes);
  const vf delta = softplus(dt + load(s.dt_bias, channel, lanes));
  alignas(64) float delta_of[W], du_of[W];
  store(delta_of, delta);
  store(du_of, delta * u);
  const int64_t pitch = s.state.stride[1];
  T* const state = static_cast<T*>(s.state.data) + row * s.state.stride[0] + channel * pitch;
  vf y = load(s.skip, channel, lanes) * u;
  for (int64_t n = 0; n < s.states; n += W) {
    const int64_t left = s.states - n;
    const vf at_n = load(B + n, left);
    vf h[W] = {};
    const auto advance_channels = [&](int64_t channels, int64_t states) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < channels; ++i) {
        T* const here = state + i * pitch + n;
        const vf A = load(s.A, (channel + i) * s.A.stride[0] + n, states) * kLog2e;
        h[i] = fma(exp2(delta_of[i] * A), load(here, states), du_of[i] * at_n);
        store(here, h[i], states);
      }
    };
    lanes == W && left >= W ? advance_channels(W, W) : advance_channels(lanes, left);
    transpose(h);
    for (int64_t k = 0; k < W && k < left; ++k) y = fma(h[k], C[n + k], y);
  }
  store(s.y, row * s.y.stride[0] + channel, y * silu(load(s.z, row * s.z.stride[0] + channel, lanes)), lanes);
}

template <class T> void advance_rows(const MambaStep& s, const Tile& tile) {
  const int64_t rows = s.batch - tile.row < kRows ? s.batch - tile.row : kRows;
  vf dt[kRows];
  rows == 1 ? low_rank<1>(s, tile, dt) : low_rank<kRows>(s, tile, dt);
  for (int64_t b = 0; b < rows; ++b) advance<T>(s, {tile.row + b, tile.channel, tile.lanes}, dt[b]);
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
  for (int64_t i = begin; i < end; ++i) f(s, tile_at(s, i, 0));
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
  const auto f = s.state.type == DType::f32 ? advance_rows<float> : advance_rows<bf16>;
  for (int64_t i = begin; i < end; ++i) f(s, tile_at(s, i, kRows));
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
