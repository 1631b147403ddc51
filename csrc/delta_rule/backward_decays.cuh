// Decays between the tokens of a chunk without a division, in four levels.
//
// Two tokens j < i differ first in one bit of their numbers, say bit n. They lie in one block of 2^(n+1) tokens, j in
// its lower half, i in its upper one, and the decay between them is that from j to the end of the lower half times that
// from there to i. So at each level a row of the chunk's matrices has one factor, at most 1, that it has with every row
// of the other half: scores and gradients are four matrix products, each masked to the pairs of its level, and a token's
// decay takes part in just those factors that include it. Halves are joined to blocks by one exchange between lanes.
#pragma once
#include "delta_rule/backward.cuh"

namespace pyseq::delta_rule {
namespace {

constexpr int kLevels = 4;

// Of each token and key, within a block: the product of the decays to the token, without its own and with it; from it
// to the end, without its own.
struct Decays {
  Tile before, through, after;

  explicit __device__ __forceinline__ Decays(const Tile& w) : through(w) {
    before = after = tile_of([](int) { return 1.f; });
  }
  // Blocks of twice as many tokens, 2^(n+1).
  __device__ __forceinline__ void join(int n, int lane) {
    const int last = n < 3 ? (lane / 4 ^ 1 << n) | ((1 << n) - 1) : 7;   // of the other half
    const Tile other = tile_of([&](int i) {
      const float x = n < 3 ? through.v[i / 4][i % 4] : through.v[i / 4][i % 4 ^ 2];
      return __shfl_sync(~0u, x, last * 4 + lane % 4);
    });
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool upper = row_of(lane, i) >> n & 1;
      const float x = other.v[i / 4][i % 4];
      before.v[i / 4][i % 4] *= upper ? x : 1.f;
      through.v[i / 4][i % 4] *= upper ? x : 1.f;
      after.v[i / 4][i % 4] *= upper ? 1.f : x;
    }
  }
  // Of the whole chunk, once it is joined, for each key of the lane.
  __device__ __forceinline__ Vec<4> whole(int lane) const {
    Vec<4> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __shfl_sync(~0u, through.v[i / 2][2 + i % 2], 28 + lane % 4);
    return x;
  }
  __device__ __forceinline__ void join_all(int lane) {
#pragma unroll 1
    for (int n = 0; n < kLevels; ++n) join(n, lane);
  }
};

__device__ __forceinline__ bool upper(int n, int lane, int i) { return row_of(lane, i) >> n & 1; }
// Of the upper half's tokens x, of the lower half's y.
__device__ __forceinline__ Tile halves(int n, const Tile& x, const Tile& y, int lane) {
  return tile_of([&](int i) { return upper(n, lane, i) ? x.v[i / 4][i % 4] : y.v[i / 4][i % 4]; });
}
// What is a pair's of level n, and zero elsewhere.
__device__ __forceinline__ Tile pairs(int n, const Tile& x, int lane) {
  return tile_of([&](int i) { return (row_of(lane, i) ^ column_of(lane, i)) >> n == 1 ? x.v[i / 4][i % 4] : 0.f; });
}

// Sums along the tokens of each half of 2^n: in upper halves of x + y, x from the token itself on, y from behind it; in
// lower halves of x + y before the token. The sum is of what that token's decay multiplies.
__device__ __forceinline__ void add_halves(int n, Tile& sum, const Tile& x, const Tile& y, int lane) {
  const int g = lane / 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool up = upper(n, lane, i);
    const auto inside = [&](int by) { return (up ? g + by : g - by) >> n == g >> n; };   // of the half
    const auto from = [&](float v, int by) { return __shfl_sync(~0u, v, (up ? lane + 4 * by : lane - 4 * by) & 31); };
    const float own = x.v[i / 4][i % 4], other = y.v[i / 4][i % 4], next = from(up ? other : own + other, 1);
    float all = (up ? own : 0.f) + (inside(1) ? next : 0.f);
#pragma unroll
    for (int by = 1; by < 8; by *= 2) {
      const float more = from(all, by);
      all += inside(by) ? more : 0.f;
    }
    sum.v[i / 4][i % 4] += all;
  }
}

// The same of the whole chunk: of `own` from the token on, of `behind` from behind it, of `ahead` before it.
__device__ __forceinline__ void add_chunk(Tile& sum, const Tile& own, const Tile& behind, const Tile& ahead, int lane) {
  const int g = lane / 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i % 4 >= 2) continue;   // tokens 0 to 7, with those 8 behind
    float* const to = sum.v[i / 4];
    float late[2], early[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = i % 4 + 2 * half;
      late[half] = own.v[i / 4][r];
      const float next = __shfl_down_sync(~0u, behind.v[i / 4][r], 4), first = ahead.v[i / 4][r];
      late[half] += g < 7 ? next : 0.f;
      const float last = __shfl_up_sync(~0u, first, 4);
      early[half] = g > 0 ? last : 0.f;
    }
    const float beyond = __shfl_sync(~0u, behind.v[i / 4][i % 4 + 2], lane % 4);
    const float within = __shfl_sync(~0u, ahead.v[i / 4][i % 4], lane % 4 + 28);
    late[0] += g == 7 ? beyond : 0.f;
    early[1] += g == 0 ? within : 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const float up = __shfl_down_sync(~0u, late[half], 4 * by), down = __shfl_up_sync(~0u, early[half], 4 * by);
        late[half] += g + by < 8 ? up : 0.f;
        early[half] += g - by >= 0 ? down : 0.f;
      }
    const float above = __shfl_sync(~0u, late[1], lane % 4), below = __shfl_sync(~0u, early[0], lane % 4 + 28);
    to[i % 4] += late[0] + above + early[0];
    to[i % 4 + 2] += late[1] + early[1] + below;
  }
}

}  // namespace
}  // namespace pyseq::delta_rule
