// A warp advances a tile of rows and states by one token. Bound by reading and writing the state: a thread has all of
// its part under way, four states at a time, before it uses any, and the lanes of a row read its states side by side.
// States of bfloat16 lie with the same threads as those of float32, so that y has the same bits.
#include "cuda/device.cuh"
#include "ssd/update.cuh"

namespace pyseq {
namespace {

constexpr int64_t kFewWarps = 264 * kWarps;   // two blocks for each multiprocessor of an H200

struct Wide {   // which tensors may be read and written 4 elements at a time
  bool state, B, C;
};

template <int L, int F, class T>
__global__ void __launch_bounds__(kThreads, 3) ssd_step_kernel(SsdStep s, Wide wide, int tiles) {
  const int lane = threadIdx.x % 32, unit = int(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
  const int row = unit / tiles / int(s.heads), head = unit / tiles % int(s.heads);
  if (row >= s.batch) return;
  const int group = head / int(s.heads / s.groups), first = unit % tiles * kTileRows<L> + lane / L * 4;
  const int rows = within(4, int(s.width) - first);
  const int64_t stride = s.state.stride[2];
  T* const tile = static_cast<T*>(s.state.data) + row * s.state.stride[0] + head * s.state.stride[1] + first * stride;
  const int64_t x_at = row * s.x.stride[0] + head * s.x.stride[1];
  float y = 0.f;
#pragma unroll 1
  for (int slice = 0; slice * kTileStates<L, F> < s.states; ++slice) {
    const int state = slice * kTileStates<L, F> + lane % L * 4, left = int(s.states) - state;
    const bool whole = wide.state && rows == 4 && left >= 4 * (F - 1) * L + 4;
    States<F> S;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 4 * F; i += 4) {
        const T* const from = tile + r * stride + state + i * L;
        Vec<4> run;
        if (whole) {
          run = load_vec<4>(from);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) run[e] = r < rows && i * L + e < left ? load(from + e) : 0.f;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) S.v[r][i + e] = run[e];
      }
    }
    const float delta = step_size(s, load(s.dt, row * s.dt.stride[0] + head), head);
    const float a = ex2(log_decay(delta, s.A[head]) * kLog2e);
    Vec<4> dx;
#pragma unroll
    for (int r = 0; r < 4; ++r) dx[r] = delta * (r < rows ? load(s.x, x_at + first + r) : 0.f);
    Vec<4 * F> B, C;
#pragma unroll
    for (int i = 0; i < 4 * F; i += 4) {
      const auto of_group = [&](const View& x, bool wide) {
        return load_vec<4>(x, row * x.stride[0] + group * x.stride[1] + state + i * L, wide, left - i * L);
      };
      const Vec<4> b = of_group(s.B, wide.B), c = of_group(s.C, wide.C);
#pragma unroll
      for (int e = 0; e < 4; ++e) B[i + e] = b[e], C[i + e] = c[e];
    }
    const float more = sum_over_lanes<L>(advance<true, F>(S, a, dx, B, C), lane);
    y = slice ? y + more : more;   // slice by slice, as the forward adds them
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 4 * F; i += 4) {
        T* const to = tile + r * stride + state + i * L;
        Vec<4> run;
#pragma unroll
        for (int e = 0; e < 4; ++e) run[e] = S.v[r][i + e];
        if (whole) {
          store_vec<4>(to, run);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (r < rows && i * L + e < left) store(to + e, run[e]);
        }
      }
    }
  }
  const int mine = first + sum_row(lane);
  if (mine >= s.width || lane % L >= 4) return;
  if (s.D) y = fmaf(s.D[head * s.D_width + (s.D_width > 1 ? mine : 0)], load(s.x, x_at + mine), y);
  if (s.z) y *= silu(load(s.z, row * s.z.stride[0] + head * s.z.stride[1] + mine));
  store(s.y, row * s.y.stride[0] + head * s.y.stride[1] + mine, y);
}

template <int L, int F, class T> int step(const SsdStep& s, void* stream) {
  const Wide wide{vectorisable(s.state, 4, 3), vectorisable(s.B, 4, 2), vectorisable(s.C, 4, 2)};
  const int64_t tiles = (s.width + kTileRows<L> - 1) / kTileRows<L>, warps = s.batch * s.heads * tiles;
  if (warps > kLongest) return cudaErrorInvalidValue;
  const int64_t together = warps < kFewWarps ? 1 : kWarps;
  const dim3 grid(unsigned((warps + together - 1) / together)), block(unsigned(32 * together));
  return launch<ssd_step_kernel<L, F, T>>(grid, block, 0, stream, s, wide, int(tiles));
}

}  // namespace

int ssd_step_cuda(const SsdStep& s, void* stream) {
  if (s.batch == 0 || s.heads == 0 || s.width == 0) return 0;
  for (const int64_t size : {s.batch, s.heads, s.width, s.states})
    if (size > kLongest) return cudaErrorInvalidValue;
  return for_states(s.states, [&]<int L, int F>() {
    return s.state.type == DType::f32 ? step<L, F, float>(s, stream) : step<L, F, __nv_bfloat16>(s, stream);
  });
}

}  // namespace pyseq
