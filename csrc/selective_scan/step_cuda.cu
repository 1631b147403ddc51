// A warp advances a tile of channels and states by one token. Bound by reading and writing the state: a thread has four
// accesses of four states under way before it uses any, and the lanes of a channel read its states side by side.
#include "cuda/device.cuh"
#include "selective_scan/update.cuh"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct Wide {   // which tensors may be read and written 4 elements at a time
  bool state, u, dt, B, C;
};

template <int L, class T>
__global__ void __launch_bounds__(kThreads, 4) selective_scan_step_kernel(SelectiveScanStep s, Wide wide, int tiles) {
  const int lane = threadIdx.x % 32, unit = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32, row = unit / tiles;
  if (row >= s.batch) return;
  const Tile tile = tile_at<L>(int(s.dim), int(s.groups), unit % tiles);
  Vec<4> y{};
#pragma unroll 1
  for (int slice = 0; slice * kTileStates<L> < s.states; ++slice) {
    const Corner at = corner_of<L>(tile, lane, slice, int(s.states));
    T* const state = static_cast<T*>(s.state.data) + row * s.state.stride[0] + at.channel * s.state.stride[1] + at.state;
    const bool whole = wide.state && at.channels >= 4 && at.states >= 4;
    const auto of_row = [&](const View& x, bool wide) {
      return load_vec<4>(x, row * x.stride[0] + at.channel, wide, at.channels);
    };
    const auto of_group = [&](const View& x, bool wide) {
      return load_vec<4>(x, row * x.stride[0] + tile.group * x.stride[1] + at.state, wide, at.states);
    };
    States h, A;
    if (whole) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Vec<4> x = load_vec<4>(state + c * s.state.stride[1]);
#pragma unroll
        for (int n = 0; n < 4; ++n) h.v[c][n] = x[n];
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          h.v[c][n] = c < at.channels && n < at.states ? load(state + c * s.state.stride[1] + n) : 0.f;
    }
    load_A(A, s.A, at, s.states);
    Vec<4> delta = of_row(s.dt, wide.dt), du = of_row(s.u, wide.u);
    const Vec<4> B = of_group(s.B, wide.B), C = of_group(s.C, wide.C);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (s.dt_bias && c < at.channels) delta[c] += s.dt_bias[at.channel + c];
      if (s.dt_softplus) delta[c] = softplus(delta[c]);
      du[c] *= delta[c];
    }
    Vec<4> more = advance(h, A, delta, du, B, C);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      T* const to = state + c * s.state.stride[1];
      if (whole) {
        store_vec<4>(to, Vec<4>{h.v[c][0], h.v[c][1], h.v[c][2], h.v[c][3]});
      } else if (c < at.channels) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
          if (n < at.states) store(to + n, h.v[c][n]);
      }
    }
    // Slice by slice, as the forward sums them: the same bits.
    sum_over_states<L>(more, lane);
#pragma unroll
    for (int i = 0; i < kSums<L>; ++i) y[i] = slice ? y[i] + more[i] : more[i];
  }
#pragma unroll
  for (int i = 0; i < kSums<L>; ++i) {
    const int c = lane / L * 4 + sums_from<L>(lane) + i;
    if (c >= tile.channels || lane % L >= 4) continue;
    const auto of_channel = [&](const View& x) { return load(x, row * x.stride[0] + tile.channel + c); };
    float out = y[i];
    if (s.D) out = fmaf(s.D[tile.channel + c], of_channel(s.u), out);
    if (s.z) out *= silu(of_channel(s.z));
    store(s.y, row * s.y.stride[0] + tile.channel + c, out);
  }
}

template <int L, class T> int step(const SelectiveScanStep& s, void* stream) {
  const bool aligned = s.groups == 1 || s.dim / s.groups % 4 == 0;   // the first channel of every group
  const Wide wide{vectorisable(s.state, 4, 2), aligned && vectorisable(s.u, 4, 1), aligned && vectorisable(s.dt, 4, 1),
                  vectorisable(s.B, 4, 2), vectorisable(s.C, 4, 2)};
  const int64_t tiles = s.groups * tiles_of_group<L>(int(s.dim / s.groups)), units = s.batch * tiles;
  if (units > kLongest) return cudaErrorInvalidValue;
  const dim3 grid(unsigned((units + kWarps - 1) / kWarps));
  return launch<selective_scan_step_kernel<L, T>>(grid, dim3(kThreads), 0, stream, s, wide, int(tiles));
}

}  // namespace

int selective_scan_step_cuda(const SelectiveScanStep& s, void* stream) {
  if (s.batch == 0 || s.dim == 0) return 0;
  for (const int64_t size : {s.batch, s.dim, s.states})
    if (size > kLongest) return cudaErrorInvalidValue;
  return for_states(s.states, [&]<int L>() {
    return s.state.type == DType::f32 ? step<L, float>(s, stream) : step<L, __nv_bfloat16>(s, stream);
  });
}

}  // namespace pyseq
