// Widths 2 to 4: a thread computes e from the window again, keeps the last W-1 of both in registers and writes dx W-1
// rows back, so that x and dy are read once. A run first repeats the W-1 tokens before it, whose e its first dx need.
// dx of the last W-1 samples of a sequence, and dstate, come from a thread per channel: they need e of few tokens only.
#include "causal_conv1d/gradient.cuh"

namespace pyseq {
namespace {

constexpr int n = 4;       // channels of a thread: eight would leave too few threads for its 100 registers
constexpr int kRows = 8;   // rows of x and dy loaded before the first is used

template <int width> struct Rolling {
  Vec<n> x[width - 1], e[width - 1];          // of the last tokens
  Vec<n> dweight[width], dbias;
};

// Where a piece stands: its next row of x, dy and, W-1 rows back, dx.
template <class E> struct Cursor { const E *x, *dy; E* dx; };

// own: the tokens count in the sums; else they only fill the window. writes: there is a sample W-1 rows back.
template <int rows, class E, int width>
__device__ __forceinline__ void tile(const CausalConv1dBackward& g, const Taps<n, width>& taps, Rolling<width>& last,
                                     Cursor<E>& at, bool own, bool writes) {
  const CausalConv1d& c = g.forward;
  Vec<n> x[width - 1 + rows], e[width - 1 + rows];
#pragma unroll
  for (int k = 0; k < width - 1; ++k) x[k] = last.x[k], e[k] = last.e[k];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    x[width - 1 + r] = load_vec<n>(at.x + r * c.x.stride[1]);
    e[width - 1 + r] = load_vec<n>(at.dy + r * g.dy.stride[1]);
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    Vec<n>& newest = e[width - 1 + r];
    if (c.silu) {
      const Vec<n> a = convolve<n, width>(taps, x + r);
#pragma unroll
      for (int i = 0; i < n; ++i) newest[i] *= silu_grad(a[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (own) {
#pragma unroll
        for (int k = 0; k < width; ++k) last.dweight[k][i] = fmaf(newest[i], x[r + k][i], last.dweight[k][i]);
        last.dbias[i] += newest[i];
      }
    }
    if (writes) {
      Vec<n> dx;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        dx[i] = taps.weight[0][i] * newest[i];
#pragma unroll
        for (int k = 1; k < width; ++k) dx[i] = fmaf(taps.weight[k][i], e[r + width - 1 - k][i], dx[i]);
      }
      store_vec<n>(at.dx + r * g.dx.stride[1], dx);
    }
  }
#pragma unroll
  for (int k = 0; k < width - 1; ++k) last.x[k] = x[rows + k], last.e[k] = e[rows + k];
  at = {at.x + rows * c.x.stride[1], at.dy + rows * g.dy.stride[1], at.dx + rows * g.dx.stride[1]};
}

template <class E, int width>
__device__ __forceinline__ void piece(const CausalConv1dBackward& g, const Taps<n, width>& taps, Rolling<width>& last,
                                      const Sequence& s, int64_t begin, int64_t end, int64_t d) {
  const CausalConv1d& c = g.forward;
  int64_t t = max(begin - (width - 1), int64_t(0));
#pragma unroll
  for (int k = 0; k < width - 1; ++k) {
    last.x[k] = sample<E, n>(c, s, t - (width - 1) + k, d);
    last.e[k] = {};
  }
  Cursor<E> at{row<const E>(c.x, s, t, d), row<const E>(g.dy, s, t, d), row<E>(g.dx, s, t - (width - 1), d)};
  if (begin >= width - 1) {
    tile<width - 1>(g, taps, last, at, false, false);
    t = begin;
  }
  while (t < end) {
    if (t >= width - 1 && t + kRows <= end) {
      tile<kRows>(g, taps, last, at, true, true);
      t += kRows;
    } else {
      tile<1>(g, taps, last, at, t >= begin, t >= begin && t >= width - 1);
      ++t;
    }
  }
}

template <class E, int width>
__global__ void __launch_bounds__(kConvThreads, 3) causal_conv1d_backward_kernel(CausalConv1dBackward g) {
  const CausalConv1d& c = g.forward;
  const int64_t warp = warp_of_grid(), ends = c.S * warps_across<1>(c.D);
  if (warp < ends) return edges<E, width>(g, unit_of<1>(warp, c.D));
  const Unit u = unit_of<n>(warp - ends, c.D);
  if (u.index >= c.runs || u.d >= c.D) return;
  const Run run = run_at(c, u.index);
  if (invalid(c)) return fill_nan<E, n>(g.dx, run, u.d);
  const Taps<n, width> taps = taps_of<n, width>(c, u.d);
  Rolling<width> last{};
  each_piece(c, run, [&](const Sequence& s, int64_t begin, int64_t end) {
    piece<E, width>(g, taps, last, s, begin, end, u.d);
  });
  float* partial = g.partial + int64_t(u.index) * (width + 1) * c.D + u.d;
#pragma unroll
  for (int k = 0; k < width; ++k) store_vec<n>(partial + k * c.D, last.dweight[k]);
  store_vec<n>(partial + width * c.D, last.dbias);
}

template <class E> int launch_width(const CausalConv1dBackward& g, void* stream) {
  switch (g.forward.W) {
    case 2: return launch_runs<n, causal_conv1d_backward_kernel<E, 2>>(g, stream);
    case 3: return launch_runs<n, causal_conv1d_backward_kernel<E, 3>>(g, stream);
    default: return launch_runs<n, causal_conv1d_backward_kernel<E, 4>>(g, stream);
  }
}

int launch_gradients(const CausalConv1dBackward& g, void* stream) {
  if (causal_conv1d_backward_is_wide(g)) return causal_conv1d_backward_wide_cuda(g, stream);
  switch (g.forward.x.type) {
    case DType::bf16: return launch_width<__nv_bfloat16>(g, stream);
    case DType::f16: return launch_width<__half>(g, stream);
    default: return launch_width<float>(g, stream);
  }
}

// Partial sums of all runs: every eighth by one warp, then the eight in order.
constexpr int kSlices = 8;

__global__ void __launch_bounds__(32 * kSlices) causal_conv1d_sum_kernel(CausalConv1dBackward g) {
  const CausalConv1d& c = g.forward;
  __shared__ float slices[kSlices][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const unsigned taps = unsigned(c.W) + 1;
  const int64_t d = int64_t(blockIdx.x / taps) * 32 + lane, k = blockIdx.x % taps;
  float sum = 0.f;
  if (d < c.D) {
#pragma unroll 4
    for (int64_t run = slice; run < c.runs; run += kSlices) sum += g.partial[(run * taps + k) * c.D + d];
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || d >= c.D) return;
  for (int i = 1; i < kSlices; ++i) sum += slices[i][lane];
  if (invalid(c)) sum = NAN;
  if (k < c.W) g.dweight[d * c.W + k] = sum;
  else if (g.dbias) g.dbias[d] = sum;
}

}  // namespace

bool causal_conv1d_backward_is_wide(const CausalConv1dBackward& g) {
  return !specialised(g.forward, n, g.forward.x, g.dy) || !vectorisable(g.dx, n, 2);
}

int causal_conv1d_backward_cuda(const CausalConv1dBackward& g, void* stream) {
  if (const int error = launch_gradients(g, stream)) return error;
  const int64_t blocks = (g.forward.D + 31) / 32 * (g.forward.W + 1);
  return blocks ? launch<causal_conv1d_sum_kernel>(dim3(unsigned(blocks)), dim3(32 * kSlices), 0, stream, g) : 0;
}

}  // namespace pyseq
