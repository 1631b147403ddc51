// A thread has the channels of one 16-byte access and a run of tokens. Its window of W-1 samples stays in registers, so
// memory is read once but for the W-1 rows before a run; no shared memory, nothing to wait for but its own loads.
// silu is exact for 16-bit outputs too: tanh.approx misses their tolerance at negative a, and memory is the bound.
#include "causal_conv1d/update.cuh"

namespace pyseq {
namespace {

constexpr int kRows = 4;   // rows loaded before the first is used: 64 bytes in flight for each of 512 threads

template <class E, int width, int rows, int n>
__device__ __forceinline__ void tile(const CausalConv1d& c, const Taps<n, width>& taps, Vec<n>* last, const E* x,
                                     E* y) {
  Vec<n> window[width - 1 + rows];
#pragma unroll
  for (int k = 0; k < width - 1; ++k) window[k] = last[k];
#pragma unroll
  for (int r = 0; r < rows; ++r) window[width - 1 + r] = load_vec<n>(x + r * c.x.stride[1]);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    Vec<n> a = convolve<n, width>(taps, window + r);
    if (c.silu) {
#pragma unroll
      for (int i = 0; i < n; ++i) a[i] = silu(a[i]);
    }
    store_vec<n>(y + r * c.y.stride[1], a);
  }
#pragma unroll
  for (int k = 0; k < width - 1; ++k) last[k] = window[rows + k];
}

// The last W-1 samples of a sequence, from before its beginning where it is shorter. kAtOnce are read before any is
// written.
template <class E> __device__ __forceinline__ void keep_state(const CausalConv1d& c, const Unit& u) {
  constexpr int kAtOnce = 3;
  if (u.d >= c.D) return;
  const bool unknown = invalid(c);
  const Sequence s = unknown ? Sequence{u.index, 0, 0, 0} : sequence(c, u.index);
#pragma unroll 1
  for (int64_t first = 1 - c.W; first < 0; first += kAtOnce) {
    float kept[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t t = s.T + first + i;
      kept[i] = first + i < 0 && t >= 0 ? load(row<const E>(c.x, s, t, u.d)) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t t = s.T + first + i;
      if (first + i >= 0) continue;
      if (t < 0) kept[i] = unknown ? NAN : sample<E, 1>(c, s, t, u.d)[0];
      c.new_state[s.in_state(c, first + i, u.d)] = kept[i];
    }
  }
}

__host__ __device__ __forceinline__ int64_t warps_of_ends(const CausalConv1d& c) {
  return c.new_state ? c.S * warps_across<1>(c.D) : 0;
}

template <class E, int width>
__global__ void __launch_bounds__(kConvThreads, 4) causal_conv1d_kernel(CausalConv1d c) {
  constexpr int n = 16 / sizeof(E);
  const int64_t warp = warp_of_grid(), ends = warps_of_ends(c);
  if (warp < ends) return keep_state<E>(c, unit_of<1>(warp, c.D));
  const Unit u = unit_of<n>(warp - ends, c.D);
  if (u.index >= c.runs || u.d >= c.D) return;
  const Run run = run_at(c, u.index);
  if (invalid(c)) return fill_nan<E, n>(c.y, run, u.d);
  const Taps<n, width> taps = taps_of<n, width>(c, u.d);
  each_piece(c, run, [&](const Sequence& s, int64_t t, int64_t end) {
    Vec<n> last[width - 1];
#pragma unroll
    for (int k = 0; k < width - 1; ++k) last[k] = sample<E, n>(c, s, t - (width - 1) + k, u.d);
    const E* x = row<const E>(c.x, s, t, u.d);
    E* y = row<E>(c.y, s, t, u.d);
#pragma unroll 1
    for (; t + kRows <= end; t += kRows, x += kRows * c.x.stride[1], y += kRows * c.y.stride[1]) {
      tile<E, width, kRows>(c, taps, last, x, y);
    }
#pragma unroll 1
    for (; t < end; ++t, x += c.x.stride[1], y += c.y.stride[1]) tile<E, width, 1>(c, taps, last, x, y);
  });
}

template <class E>
__global__ void __launch_bounds__(kConvThreads, 8) causal_conv1d_any_kernel(CausalConv1d c) {
  const int64_t warp = warp_of_grid(), ends = warps_of_ends(c);
  if (warp < ends) return keep_state<E>(c, unit_of<1>(warp, c.D));
  const Unit u = unit_of<1>(warp - ends, c.D);
  if (u.index >= c.runs || u.d >= c.D) return;
  const Run run = run_at(c, u.index);
  if (invalid(c)) return fill_nan<E, 1>(c.y, run, u.d);
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float a = convolve_any<E>(c, s, t, u.d);
      store(row<E>(c.y, s, t, u.d), c.silu ? silu(a) : a);
    }
  });
}

template <int n, auto kernel> int launch_runs(const CausalConv1d& c, void* stream) {
  const int64_t warps = warps_of_ends(c) + c.runs * warps_across<n>(c.D);
  return warps ? launch<kernel>(conv_grid(warps), dim3(kConvThreads), 0, stream, c) : 0;
}

template <class E> int launch_width(const CausalConv1d& c, void* stream) {
  constexpr int n = 16 / sizeof(E);
  if (!specialised(c, n, c.x, c.y)) return launch_runs<1, causal_conv1d_any_kernel<E>>(c, stream);
  switch (c.W) {
    case 2: return launch_runs<n, causal_conv1d_kernel<E, 2>>(c, stream);
    case 3: return launch_runs<n, causal_conv1d_kernel<E, 3>>(c, stream);
    default: return launch_runs<n, causal_conv1d_kernel<E, 4>>(c, stream);
  }
}

}  // namespace

int causal_conv1d_forward_cuda(const CausalConv1d& c, void* stream) {
  switch (c.x.type) {
    case DType::bf16: return launch_width<__nv_bfloat16>(c, stream);
    case DType::f16: return launch_width<__half>(c, stream);
    default: return launch_width<float>(c, stream);
  }
}

}  // namespace pyseq
