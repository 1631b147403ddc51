// What the kernels share on a GPU: which warp does what, the walk over sequences, one token.
#pragma once
#include "causal_conv1d/kernel.h"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"

namespace pyseq {
namespace {

constexpr int kConvThreads = 128, kConvWarps = kConvThreads / 32;

// A warp has 32 n neighbouring channels of one run or one sequence. Warps are numbered with the channels innermost, so
// that warps of a block read neighbouring memory. Those of the ends of sequences come first: each waits for scattered
// loads, in the shadow of the runs.
template <int n> constexpr int64_t warps_across(int64_t D) { return (D + 32 * n - 1) / (32 * n); }
__device__ __forceinline__ int64_t warp_of_grid() { return int64_t(blockIdx.x) * kConvWarps + threadIdx.x / 32; }
inline dim3 conv_grid(int64_t warps) { return dim3(unsigned((warps + kConvWarps - 1) / kConvWarps)); }

struct Unit { int index, d; };   // which run or sequence, and the thread's first channel, which may be beyond D

template <int n> __device__ __forceinline__ Unit unit_of(int64_t warp, int64_t D) {
  const unsigned w = unsigned(warp), across = unsigned(warps_across<n>(D));
  return {int(w / across), int(w % across * 32 + threadIdx.x % 32) * n};
}

// T tokens from token `first` of batch row `batch` on; t counts from the sequence's own beginning.
struct Sequence {
  int64_t index, batch, first, T;

  __device__ __forceinline__ int64_t at(const View& x, int64_t t, int64_t d) const {
    return batch * x.stride[0] + (first + t) * x.stride[1] + d;
  }
  // Where sample t < 0 of channel d stands in a [S, D, W-1] state.
  __device__ __forceinline__ int64_t in_state(const CausalConv1d& c, int64_t t, int64_t d) const {
    return (index * c.D + d + 1) * (c.W - 1) + t;
  }
};

__device__ __forceinline__ Sequence sequence(const CausalConv1d& c, int64_t s) {
  if (!c.cu_seqlens) return {s, s, 0, c.T};
  return {s, 0, c.cu_seqlens[s], c.cu_seqlens[s + 1] - c.cu_seqlens[s]};
}
// cu_seqlens out of order: results are NaN, and no address comes from it.
__device__ __forceinline__ bool invalid(const CausalConv1d& c) { return c.sequence_of && c.sequence_of[0] < 0; }

// Tokens [begin, end) of a batch row.
struct Run { int batch; int64_t begin, end; };

__device__ __forceinline__ Run run_at(const CausalConv1d& c, int64_t index) {
  const unsigned each = unsigned(c.runs) / unsigned(c.B), batch = unsigned(index) / each;
  const int64_t begin = (index - int64_t(batch) * each) * c.rows;
  return {int(batch), begin, min(begin + c.rows, c.T)};
}

// f(sequence, begin, end) for every piece of a sequence in a run, in order.
template <class F> __device__ __forceinline__ void each_piece(const CausalConv1d& c, const Run& run, const F& f) {
  for (int64_t t = run.begin; t < run.end;) {
    const Sequence s = sequence(c, c.sequence_of ? c.sequence_of[t] : run.batch);
    const int64_t end = min(run.end, s.first + s.T);
    f(s, t - s.first, end - s.first);
    t = end;
  }
}

// A row of x at token t, from channel d on. E is its dtype.
template <class E> __device__ __forceinline__ E* row(const View& x, const Sequence& s, int64_t t, int64_t d) {
  return static_cast<E*>(x.data) + s.at(x, t, d);
}

template <class E, int n>
__device__ __forceinline__ Vec<n> sample(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t d) {
  if (t >= 0) return load_vec<n>(row<const E>(c.x, s, t, d));
  Vec<n> x;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = c.state ? c.state[s.in_state(c, t, d + i)] : 0.f;
  return x;
}

template <int n, int width> struct Taps { Vec<n> weight[width], bias; };

// The taps of n channels are neighbours in memory: in accesses as wide as they fit.
template <int n, int width> __device__ __forceinline__ Taps<n, width> taps_of(const CausalConv1d& c, int64_t d) {
  constexpr int kTaps = n * width, kEach = kTaps % 4 == 0 ? 4 : kTaps % 2 == 0 ? 2 : 1;
  Taps<n, width> taps{};
  if (c.bias) taps.bias = load_vec<n>(c.bias + d);
#pragma unroll
  for (int j = 0; j < kTaps; j += kEach) {
    const Vec<kEach> some = load_vec<kEach>(c.weight + d * width + j);
#pragma unroll
    for (int i = 0; i < kEach; ++i) taps.weight[(j + i) % width][(j + i) / width] = some[i];
  }
  return taps;
}

// a of the newest sample in the window: the bias first, then the taps from the oldest sample to the newest.
template <int n, int width>
__device__ __forceinline__ Vec<n> convolve(const Taps<n, width>& taps, const Vec<n>* window) {
  Vec<n> a = taps.bias;
#pragma unroll
  for (int k = 0; k < width; ++k) {
#pragma unroll
    for (int i = 0; i < n; ++i) a[i] = fmaf(taps.weight[k][i], window[k][i], a[i]);
  }
  return a;
}

// The same for one channel of any width, every sample read from memory.
template <class E>
__device__ __forceinline__ float convolve_any(const CausalConv1d& c, const Sequence& s, int64_t t, int64_t d) {
  float a = c.bias ? c.bias[d] : 0.f;
  for (int64_t k = 0; k < c.W; ++k) {
    a = fmaf(c.weight[d * c.W + k], sample<E, 1>(c, s, t - (c.W - 1) + k, d)[0], a);
  }
  return a;
}

template <class E, int n> __device__ __forceinline__ void fill_nan(const View& y, const Run& run, int64_t d) {
  Vec<n> nan;
#pragma unroll
  for (int i = 0; i < n; ++i) nan[i] = NAN;
#pragma unroll 1
  for (int64_t t = run.begin; t < run.end; ++t) store_vec<n>(row<E>(y, {0, run.batch, 0, 0}, t, d), nan);
}

// Whether kernels that are specialised for a width may run: whole vectors of n channels, each one access, and of taps.
inline bool specialised(const CausalConv1d& c, int n, const View& x, const View& y) {
  const bool aligned = (reinterpret_cast<uintptr_t>(c.weight) | reinterpret_cast<uintptr_t>(c.bias)) % 16 == 0;
  return c.W >= 2 && c.W <= 4 && c.D % n == 0 && aligned && vectorisable(x, n, 2) && vectorisable(y, n, 2);
}

}  // namespace
}  // namespace pyseq
