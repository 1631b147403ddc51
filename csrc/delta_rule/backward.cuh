// How the gradient is divided up, and what its kernels leave for each other.
//
//   delta_rule_backward_kernel   all else; a block has one head of one sequence and some columns of its state at a time
//   delta_rule_finish_kernel     where columns are dealt out: adds what blocks left; NaN where cu_seqlens is not valid
//
// A block walks its sequence from the last kDeltaKeep tokens to the first: the state before each chunk of 16 tokens,
// the scores and p again from what the forward kept (backward_recompute.cuh), then the chunks from the last to the
// first (backward_gradient.cuh). Its warps have 16 keys each, or two times 16, of all that is per key: nothing of theirs
// is exchanged but sums over keys. One head of one sequence is not divided along time: few of both leave the GPU idle.
#pragma once
#include <type_traits>

#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "delta_rule/kernel.h"

namespace pyseq::delta_rule {

int delta_rule_chunks_cuda(const DeltaRule&, void* stream);
int delta_rule_finish_cuda(const DeltaRule&, void* stream);

namespace {

constexpr int kChunk = 16, kChunks = int(kDeltaKeep) / kChunk;
constexpr int kStride = 20;   // of 16 numbers in shared memory: fragments and those of the transpose meet no bank twice
constexpr int64_t kMostBlocks = 1024, kLongest = 1 << 30;

// Warps of a block; 16 keys each, how many times; columns of a state, in 16s.
template <int warps, int key_tiles, int value_tiles> struct Shape {
  static constexpr int kWarps = warps, kThreads = 32 * warps, kKeyTiles = key_tiles, kValueTiles = value_tiles;
  static constexpr int kValues = 16 * value_tiles, kTiles = warps * key_tiles;
  static constexpr int kRowStride = (kValues + 31) / 32 * 32 + (kValues < 32 ? -12 : 20);   // kStride, modulo 32
  static constexpr int kStates = kTiles * value_tiles * 256;                                // floats of a state
  // What a block keeps of a span: states before chunks, scores, p.
  static constexpr int kScores = kChunks * kStates, kCorrections = kScores + kChunks * 768;
  static constexpr int kOwn = kCorrections + kChunks * kChunk * kValues;
  // Of a warp. What it leaves for the others, before it is summed over warps: scores and A S, or b G and k G. Its own:
  // tiles on their way from rows to columns, and behind them q, k, a and b.
  static constexpr int kTurned = kStride * 16 * (value_tiles > 2 ? value_tiles : 2), kMine = kTurned + 4 * 256;
  static constexpr int kShared = kValues * 16 + (768 > kValues * 16 ? 768 : kValues * 16);
  static constexpr int kLeft = kMine > kShared ? kMine : kShared;
};
using Narrow = Shape<4, 1, 4>;    // K to 64, 64 columns
using Middle = Shape<8, 1, 2>;    // to 128, 32
using Wide = Shape<8, 2, 1>;      // to 256, 16

// Calls f(Shape) with that of K.
template <class F> auto for_keys(int64_t keys, F f) {
  return keys <= 64 ? f(Narrow{}) : keys <= 128 ? f(Middle{}) : f(Wide{});
}

struct Plan {
  int64_t parts, units, blocks;   // of columns; sequences, heads, parts; blocks of the launch
  bool wide_q, wide_k, wide_a, wide_b, wide_g, wide_v, wide_dy;   // 4 elements at once
  View g, dq, dk, da, db, dg;     // dq, ...: where blocks leave them; stride[2] of g and dg is that of heads always
  bool wide_dq, wide_dk, wide_da, wide_db, wide_dg, wide_dv;
  int64_t slab, slab_g;           // floats of dq, ... and of dg of one part; 0: there is only one, it has the outputs
  float* own;                     // [blocks, Shape::kOwn]
  int64_t floats;

  explicit Plan(const DeltaRule& s) {
    const int64_t values = for_keys(s.keys, [](auto shape) { return int64_t(decltype(shape)::kValues); });
    const int64_t each = for_keys(s.keys, [](auto shape) { return int64_t(decltype(shape)::kOwn); });
    parts = (s.values + values - 1) / values;
    units = s.sequences * s.heads * parts;
    blocks = units < kMostBlocks ? units : kMostBlocks;
    g = s.g, dq = s.dq, dk = s.dk, da = s.da, db = s.db, dg = s.dg;
    if (s.one_decay) g.stride[2] = dg.stride[2] = 1;
    floats = 0;
    const auto take = [&](int64_t count) {
      float* const to = s.workspace + floats;
      floats += (count + 15) / 16 * 16;
      return to;
    };
    own = take(blocks * each);
    slab = slab_g = 0;
    if (parts > 1) {
      const int64_t keys = (s.keys + 3) / 4 * 4, heads = s.heads, rows = s.batch * s.time * heads;
      slab = rows * keys;
      slab_g = s.one_decay ? rows : slab;
      for (View* x : {&dq, &dk, &da, &db, &dg}) {
        const bool one = x == &dg && s.one_decay;
        const int64_t step = one ? 1 : keys;
        const bool there = x == &dg ? bool(s.g) : x == &da || x == &db ? bool(s.a) : true;
        if (there) *x = {take(parts * (one ? rows : slab)), DType::f32, {s.time * heads * step, heads * step, step}};
      }
    }
    wide_q = vectorisable(s.q, 4, 3), wide_k = vectorisable(s.k, 4, 3), wide_v = vectorisable(s.v, 4, 3);
    wide_a = vectorisable(s.a, 4, 3), wide_b = vectorisable(s.b, 4, 3), wide_dy = vectorisable(s.dy, 4, 3);
    wide_g = vectorisable(g, 4, 3), wide_dg = vectorisable(dg, 4, 3), wide_dv = vectorisable(s.dv, 4, 3);
    wide_dq = vectorisable(dq, 4, 3), wide_dk = vectorisable(dk, 4, 3);
    wide_da = vectorisable(da, 4, 3), wide_db = vectorisable(db, 4, 3);
  }
};

__device__ __forceinline__ bool invalid(const DeltaRule& s) { return s.sequence_of && s.sequence_of[0] < 0; }

// Fragments of 16 by 16 numbers, x, in the lanes' registers: lane 4 g + t has at v[n][r] row g + 8 (r / 2), column
// 8 n + 2 t + r % 2. In memory that column is channel 4 t + 2 n + r % 2, so that a lane's are neighbours; the order in
// which keys or values are summed is free.
struct Tile { float v[2][4]; };

__device__ __forceinline__ int row_of(int lane, int i) { return lane / 4 + i % 4 / 2 * 8; }
__device__ __forceinline__ int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
__device__ __forceinline__ int place_of(int channel) {   // the column
  return channel / 16 * 16 + channel % 4 / 2 * 8 + channel % 16 / 4 * 2 + channel % 2;
}
__device__ __forceinline__ int channel_of(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

template <class F> __device__ __forceinline__ Tile tile_of(F f) {   // f(i): element i of v
  Tile x;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.v[i / 4][i % 4] = f(i);
  return x;
}
__device__ __forceinline__ Tile operator*(const Tile& x, const Tile& y) {
  return tile_of([&](int i) { return x.v[i / 4][i % 4] * y.v[i / 4][i % 4]; });
}
__device__ __forceinline__ void add_product(Tile& sum, const Tile& x, const Tile& y) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.v[i / 4][i % 4] = fmaf(x.v[i / 4][i % 4], y.v[i / 4][i % 4], sum.v[i / 4][i % 4]);
}

// By keys, a lane's four.
__device__ __forceinline__ void add_product(Tile& sum, const Vec<4>& x, const Tile& y) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum.v[i / 4][i % 4] = fmaf(x[i / 4 * 2 + i % 2], y.v[i / 4][i % 4], sum.v[i / 4][i % 4]);
}

// Rows at `at`, or columns: x is the transpose of what lies there.
__device__ __forceinline__ Tile load_rows(const float* at, int stride, int lane) {
  Tile x;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(at + row_of(lane, i) * stride + column_of(lane, i));
    x.v[i / 4][i % 4] = pair.x, x.v[i / 4][i % 4 + 1] = pair.y;
  }
  return x;
}
__device__ __forceinline__ Tile load_columns(const float* at, int stride, int lane) {
  return tile_of([&](int i) { return at[column_of(lane, i) * stride + row_of(lane, i)]; });
}
__device__ __forceinline__ void store_rows(float* at, int stride, const Tile& x, int lane) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float2* const to = reinterpret_cast<float2*>(at + row_of(lane, i) * stride + column_of(lane, i));
    *to = {x.v[i / 4][i % 4], x.v[i / 4][i % 4 + 1]};
  }
}

// As they are, 256 numbers.
__device__ __forceinline__ void put(float* at, const Tile& x, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    store_vec<4>(at + (32 * n + lane) * 4, Vec<4>{{x.v[n][0], x.v[n][1], x.v[n][2], x.v[n][3]}});
  }
}
__device__ __forceinline__ Tile get(const float* at, int lane) {
  Tile x;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const Vec<4> y = load_vec<4>(at + (32 * n + lane) * 4);
#pragma unroll
    for (int r = 0; r < 4; ++r) x.v[n][r] = y[r];
  }
  return x;
}

// Four neighbours at `at`, of which `count` exist; all of them in one access where it may be, else one by one, in a
// loop: kernels are full of these. Any: a dtype known only at run time.
struct Any {};
template <class T> __device__ __forceinline__ Vec<4> load_four(const View& x, int64_t at, bool wide, int64_t count) {
  constexpr bool kAny = std::is_same_v<T, Any>;
  using Typed = std::conditional_t<kAny, float, T>;
  const Typed* const from = static_cast<const Typed*>(x.data) + at;
  if (wide && count >= 4) {
    if constexpr (kAny) return load_vec<4>(x, at, true);
    else return load_vec<4>(from);
  }
  Vec<4> y{};
#pragma unroll 1
  for (int i = 0; i < min(count, int64_t(4)); ++i) {
    const float one = kAny ? load(x, at + i) : load(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = i == j ? one : y[j];
  }
  return y;
}
__device__ __forceinline__ void store_four(const View& x, int64_t at, const Vec<4>& y, bool wide, int64_t count) {
  if (wide && count >= 4) return store_vec<4>(x, at, y, true);
#pragma unroll 1
  for (int i = 0; i < min(count, int64_t(4)); ++i)
    store(x, at + i, i == 0 ? y[0] : i == 1 ? y[1] : i == 2 ? y[2] : y[3]);
}

}  // namespace
}  // namespace pyseq::delta_rule
