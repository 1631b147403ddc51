// How a block of the sequential form brings in its tokens, kTokens at a time: B and C for all of its warps, x and z for
// each.
//
// A thread copies 4 neighbouring elements at a time, as they are, to where they wait in shared memory while the tokens
// before are computed. Converted, they are left there in float32.
#pragma once
#include "cuda/staging.cuh"
#include "ssd/forward.cuh"

namespace pyseq {
namespace {

constexpr int kTokens = 16;

// Shared memory: B and C in float32, then as they came; then, for each warp, x and y in float32, delta and decay, x and
// z as they came.
template <int L, int F> struct Place {
  static constexpr int kB = 0, kC = kTokens * kTileStates<L, F>, kShared = 2 * kC;                          // floats
  static constexpr int kX = 0, kY = kTokens * kTileRows<L>, kSteps = 2 * kY, kOwn = kSteps + 2 * kTokens;   // of a warp
};

struct Layout {
  Staged B, C, x, z;
  bool wide_y;
  int shared, own;   // bytes of the block, of each warp
};

template <int L, int F> Layout layout(const Ssd& s) {
  using At = Place<L, F>;
  Layout at{};
  at.shared = At::kShared * 4;
  at.own = At::kOwn * 4;
  at.B = stage(s.B, 3, At::kC, at.shared);
  at.C = stage(s.C, 3, At::kC, at.shared);
  at.x = stage(s.x, 3, At::kY, at.own);
  at.z = stage(s.z, 3, At::kY, at.own);
  at.wide_y = vectorisable(s.y, 4, 3);
  return at;
}

template <int L, int F> struct Tokens {
  using At = Place<L, F>;
  static constexpr int kPasses = kTokens / L;                             // a warp copies L rows of x at a time
  static constexpr int kFours = kTokens * kTileStates<L, F> / 4;          // of B
  static constexpr int kFoursEach = (kFours + kThreads - 1) / kThreads;

  const Ssd& s;
  const Layout& at;
  unsigned char *shared, *own;
  int end, lane;
  int row, head, group;      // the row of the batch
  int first, rows;           // the first row of the tile, and how many there are; none: the warp only helps

  __device__ __forceinline__ float* block(int i) const { return reinterpret_cast<float*>(shared) + i; }
  __device__ __forceinline__ float* warp(int i) const { return reinterpret_cast<float*>(own) + i; }
  __device__ __forceinline__ int token() const { return lane / (32 / L); }   // of the first four that the lane copies
  __device__ __forceinline__ int four() const { return lane % (32 / L) * 4; }
  __device__ __forceinline__ int left(int begin) const { return min(kTokens, end - begin); }
  __device__ __forceinline__ int64_t of_row(const View& x, int t) const {
    return row * x.stride[0] + t * x.stride[1] + head * x.stride[2] + first + four();
  }
  __device__ __forceinline__ float dt(int begin) const {
    const bool there = lane < left(begin) && rows > 0;
    return there ? load(s.dt, row * s.dt.stride[0] + (begin + lane) * s.dt.stride[1] + head) : 0.f;
  }

  __device__ __forceinline__ void fetch_rows(const Staged& x, int begin) const {
    const int size = int(size_of(x.x.type)), count = within(4, rows - four());
#pragma unroll 1
    for (int k = 0; k < kPasses; ++k) {
      const int t = k * L + token();
      copy_four(x, own + x.raw + (k * 32 + lane) * 4 * size, of_row(x.x, begin + t), t < left(begin) ? count : 0);
    }
  }
  __device__ __forceinline__ void fetch_states(const Staged& x, int begin, int slice) const {
    const int size = int(size_of(x.x.type));
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kFours; i += kThreads) {
      const int t = i / (kTileStates<L, F> / 4), state = slice * kTileStates<L, F> + i % (kTileStates<L, F> / 4) * 4;
      const int64_t from = row * x.x.stride[0] + (begin + t) * x.x.stride[1] + group * x.x.stride[2] + state;
      copy_four(x, shared + x.raw + i * 4 * size, from, t < left(begin) ? within(4, int(s.states) - state) : 0);
    }
  }
  template <bool kOutput> __device__ __forceinline__ void fetch(int begin, int slice) const {
    fetch_states(at.B, begin, slice);
    if (kOutput) fetch_states(at.C, begin, slice);
    fetch_rows(at.x, begin);
    if (kOutput && s.z) fetch_rows(at.z, begin);
  }

  __device__ __forceinline__ void convert_states(const Staged& x, int to) const {
#pragma unroll
    for (int k = 0; k < kFoursEach; ++k) {
      const int i = k * kThreads + int(threadIdx.x);
      if (kFours % kThreads == 0 || i < kFours) store_vec<4>(block(to) + i * 4, staged_four(shared, x, i));
    }
  }
  __device__ __forceinline__ void convert_rows() const {
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      const int i = k * 32 + lane;
      store_vec<4>(warp(At::kX) + i * 4, staged_four(own, at.x, i));
    }
  }
  // delta and decay of the tokens; returns the logarithm of this lane's.
  __device__ __forceinline__ float convert_steps(float dt, float A, int begin) const {
    const float delta = step_size(s, dt, head), l = log_decay(delta, A) * kLog2e;
    if (lane < kTokens) {
      warp(At::kSteps)[2 * lane] = delta;
      warp(At::kSteps)[2 * lane + 1] = ex2(l);
    }
    return lane < left(begin) ? l : 0.f;
  }

  // y of the tile, after the slices before; with skip and gate after the last.
  __device__ __forceinline__ void store_rows(float* partial, int begin, int slice, bool last) const {
    const int count = within(4, rows - four());
    Vec<4> D{};
    for (int i = 0; i < count; ++i)
      D[i] = s.D ? s.D[head * s.D_width + (s.D_width > 1 ? first + four() + i : 0)] : 0.f;
#pragma unroll 1
    for (int k = 0; k < kPasses; ++k) {
      const int t = k * L + token(), i = k * 32 + lane;
      if (t >= left(begin) || count == 0) continue;
      const int64_t sum = (((row * s.time + begin + t) * s.heads) + head) * s.width + first + four();
      Vec<4> y = load_vec<4>(warp(At::kY) + i * 4);
      if (slice > 0) {
        for (int c = 0; c < count; ++c) y[c] = partial[sum + c] + y[c];
      }
      if (!last) {
        for (int c = 0; c < count; ++c) partial[sum + c] = y[c];
        continue;
      }
      const Vec<4> x = load_vec<4>(warp(At::kX) + i * 4);
      if (s.D) {
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] = fmaf(D[c], x[c], y[c]);
      }
      if (s.z) {
        const Vec<4> z = staged_four(own, at.z, i);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] *= silu(z[c]);
      }
      store_vec<4>(s.y, of_row(s.y, begin + t), y, at.wide_y, count);
    }
  }
};

}  // namespace
}  // namespace pyseq
