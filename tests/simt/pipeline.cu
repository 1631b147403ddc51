// cp.async, named barriers and mbarriers. `fault` picks what is left out; 0 is the faultless kernel.
#include <cstdint>

#include "cuda/async.cuh"
#include "cuda/barrier.cuh"

namespace pyseq {
namespace {

constexpr int kTile = 64;

enum CopyFault { no_wait = 1, too_weak_wait, no_barrier, no_second_barrier, misaligned, uncommitted, never_waited };

// y = x with each tile of 64 reversed, zeros after n; two tiles in flight. One copy of `bytes` bytes per thread.
template <int bytes>
__global__ void __launch_bounds__(kTile) reverse_tiles_kernel(const float* x, float* y, int n, int fault) {
  __shared__ __align__(16) float tile[2][kTile + 4];
  constexpr int kEach = bytes / 4;
  const int i = threadIdx.x * kEach, tiles = (n + kTile - 1) / kTile;
  const auto fetch = [&](int t) {
    const int first = t * kTile + i, left = n - first, used = left <= 0 ? 0 : left < kEach ? left : kEach;
    if (i < kTile) cp_async<bytes>(tile[t % 2] + i + (fault == misaligned), left > 0 ? x + first : x, 4 * used);
    if (fault != uncommitted) cp_async_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) fetch(t + 1);
    if (t + 1 < tiles && fault != too_weak_wait) cp_async_wait<1>();
    else if (fault == too_weak_wait) cp_async_wait<2>();
    else if (fault != no_wait) cp_async_wait<0>();
    if (fault != no_barrier) __syncthreads();
    y[t * kTile + threadIdx.x] = tile[t % 2][kTile - 1 - threadIdx.x];
    if (fault != no_second_barrier) __syncthreads();
  }
  if (fault == never_waited) fetch(0);
}

enum BarrierFault { no_arrival = 1, no_full_wait, no_empty_wait, not_initialised, no_barrier_after_init, wrong_count };

// Warp 0 produces `rounds` values per lane into a ring of two slots; warp 1 consumes them: y = sum of i x over rounds
// i.
__global__ void __launch_bounds__(64) ring_kernel(const float* x, float* y, int rounds, int fault) {
  __shared__ float slot[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0 && fault != not_initialised) {
    for (int s = 0; s < 2; ++s) mbarrier_init(full + s, 32), mbarrier_init(empty + s, fault == wrong_count ? 33 : 32);
  }
  if (fault != no_barrier_after_init) __syncthreads();
  if (threadIdx.x < 32) {
    for (int i = 0; i < rounds; ++i) {
      const int s = i % 2, lap = i / 2;
      if (fault != no_empty_wait) mbarrier_wait(empty + s, (lap + 1) % 2);   // the first lap finds the slots empty
      slot[s][31 - lane] = float(i) * x[lane];
      if (fault != no_arrival || lane != 7) mbarrier_arrive(full + s);
    }
  } else {
    float sum = 0.f;
    for (int i = 0; i < rounds; ++i) {
      const int s = i % 2, lap = i / 2;
      if (fault != no_full_wait) mbarrier_wait(full + s, lap % 2);
      sum += slot[s][31 - lane];
      mbarrier_arrive(empty + s);
    }
    y[lane] = sum;
  }
}

enum NamedFault { missing = 1, other_barrier, odd_count, alone };

// Two pairs of warps; each pair swaps its values, by a barrier of its own that the other pair does not come to.
__global__ void __launch_bounds__(128) pairs_kernel(const float* x, float* y, int rounds, int fault) {
  __shared__ float value[128];
  const int i = threadIdx.x, pair = i / 64;
  float v = x[i];
  for (int r = 0; r < rounds + 2 * pair; ++r) {
    value[i] = v;
    const int id = (fault == other_barrier && i % 64 >= 32 ? 3 : 1) + pair;
    if (fault == alone && i < 32) continue;
    if (fault != missing) named_barrier(id, fault == odd_count ? 63 : 64);
    v += value[i ^ 32];
    if (fault != missing) named_barrier(id, 64);
  }
  y[i] = v;
}

}  // namespace
}  // namespace pyseq

#pragma GCC visibility push(default)
extern "C" {
int reverse_tiles(const float* x, float* y, int n, int bytes, int fault) {
  if (bytes == 4) return pyseq::launch<pyseq::reverse_tiles_kernel<4>>(1, pyseq::kTile, 0, nullptr, x, y, n, fault);
  if (bytes == 8) return pyseq::launch<pyseq::reverse_tiles_kernel<8>>(1, pyseq::kTile, 0, nullptr, x, y, n, fault);
  return pyseq::launch<pyseq::reverse_tiles_kernel<16>>(1, pyseq::kTile, 0, nullptr, x, y, n, fault);
}
int ring(const float* x, float* y, int rounds, int fault) {
  return pyseq::launch<pyseq::ring_kernel>(1, 64, 0, nullptr, x, y, rounds, fault);
}
int pairs(const float* x, float* y, int rounds, int fault) {
  return pyseq::launch<pyseq::pairs_kernel>(1, 128, 0, nullptr, x, y, rounds, fault);
}
}
#pragma GCC visibility pop
