// One token of the recurrence, and how a tile of states is brought in and out. Forward and step share it.
#pragma once
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "selective_scan/kernel.h"

namespace pyseq {
namespace {

// A warp holds a tile: 128 / L channels of one group times 4 L states, 4 x 4 in the registers of a thread. L neighbouring
// lanes hold the states of the same channels. More than 64 states are walked in slices of 64.
template <int L> constexpr int kTileChannels = 128 / L;
template <int L> constexpr int kTileStates = 4 * L;

// f<L>() for the L that N states need.
template <class F> auto for_states(int64_t N, const F& f) {
  if (N <= 4) return f.template operator()<1>();
  if (N <= 8) return f.template operator()<2>();
  if (N <= 16) return f.template operator()<4>();
  if (N <= 32) return f.template operator()<8>();
  return f.template operator()<16>();
}

// Places along an axis are int, offsets into memory int64_t. No axis is longer than this.
constexpr int64_t kLongest = INT32_MAX - kChunk;

// The tiles of a row: those of group 0, then those of group 1, ...
template <int L> constexpr int tiles_of_group(int channels) { return (channels + kTileChannels<L> - 1) / kTileChannels<L>; }

struct Tile {
  int channel, channels, group;   // the first channel, and how many there are
};

template <int L> __device__ __forceinline__ Tile tile_at(int dim, int groups, int i) {
  const int per_group = tiles_of_group<L>(dim / groups), group = i / per_group, first = i % per_group * kTileChannels<L>;
  return {group * (dim / groups) + first, min(dim / groups - first, kTileChannels<L>), group};
}

// What a thread holds of a tile, [channel][state]: `channels` of channel, .. and `states` of state, .. exist.
struct Corner {
  int channel, channels, state, states;
};
struct States {
  float v[4][4];
};

template <int L> __device__ __forceinline__ Corner corner_of(const Tile& tile, int lane, int slice, int states) {
  const int channel = lane / L * 4, state = slice * kTileStates<L> + lane % L * 4;
  return {tile.channel + channel, tile.channels - channel, state, min(states - state, 4)};
}

__device__ __forceinline__ bool wide(const float* p, int count) { return count >= 4 && reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// From and to a matrix [D, N]; `otherwise` where there is none, zeros beyond its edges.
__device__ __forceinline__ void load_states(States& to, const float* from, const Corner& at, int64_t N, float otherwise) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t row = int64_t(at.channel + c) * N + at.state;
    const int count = !from || c >= at.channels ? 0 : at.states;
    if (count && wide(from + row, count)) {
      const Vec<4> x = load_vec<4>(from + row);
#pragma unroll
      for (int n = 0; n < 4; ++n) to.v[c][n] = x[n];
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) to.v[c][n] = n < count ? from[row + n] : from ? 0.f : otherwise;
    }
  }
}

__device__ __forceinline__ void store_states(float* to, const States& from, const Corner& at, int64_t N) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (c >= at.channels) break;
    float* const row = to + int64_t(at.channel + c) * N + at.state;
    if (wide(row, at.states)) {
      store_vec<4>(row, Vec<4>{from.v[c][0], from.v[c][1], from.v[c][2], from.v[c][3]});
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (n < at.states) row[n] = from.v[c][n];
    }
  }
}

// A times log2 e, since exp(delta A) = 2^(delta A log2 e). Where there is no state A is zero, as B is: h stays zero.
__device__ __forceinline__ void load_A(States& A, const float* from, const Corner& at, int64_t N) {
  load_states(A, from, at, N, 0.f);
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int n = 0; n < 4; ++n) A.v[c][n] *= kLog2e;
}

// One token of the thread's states: h = exp(delta A) h + du B, where du = delta u, and y = <C, h>.
template <bool kOutput = true>
__device__ __forceinline__ Vec<4> advance(States& h, const States& A, const Vec<4>& delta, const Vec<4>& du, const Vec<4>& B,
                                          const Vec<4>& C) {
  Vec<4> y{};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      h.v[c][n] = fmaf(ex2(delta[c] * A.v[c][n]), h.v[c][n], du[c] * B[n]);
      if constexpr (kOutput) y[c] = n ? fmaf(h.v[c][n], C[n], y[c]) : h.v[c][n] * C[n];
    }
  }
  return y;
}

// Sums y over the L lanes of a channel by recursive halving: 4 channels at the price of 3 shuffles where L is 4. A lane is
// left with the sums of kSums<L> channels from sums_from<L>(lane) on; from the fifth of the L lanes on they are repeated.
template <int L> constexpr int kSums = L == 1 ? 4 : L == 2 ? 2 : 1;
template <int L> __device__ __forceinline__ int sums_from(int lane) {
  return L == 1 ? 0 : L == 2 ? lane % 2 * 2 : lane % 2 * 2 + lane / 2 % 2;
}
template <int L> __device__ __forceinline__ void sum_over_states(Vec<4>& y, int lane) {
  if constexpr (L > 1) {
    const bool upper = lane % 2;
    const float give0 = upper ? y[0] : y[2], give1 = upper ? y[1] : y[3];
    y[0] = (upper ? y[2] : y[0]) + __shfl_xor_sync(~0u, give0, 1);
    y[1] = (upper ? y[3] : y[1]) + __shfl_xor_sync(~0u, give1, 1);
  }
  if constexpr (L > 2) {
    const bool upper = lane / 2 % 2;
    const float give = upper ? y[0] : y[1];
    y[0] = (upper ? y[1] : y[0]) + __shfl_xor_sync(~0u, give, 2);
  }
#pragma unroll
  for (int d = 4; d < L; d *= 2) y[0] += __shfl_xor_sync(~0u, y[0], d);
}

}  // namespace
}  // namespace pyseq
