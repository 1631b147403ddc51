// What a block works on, and how its warps read and write it.
#pragma once
#include "cuda/opaque.cuh"
#include "delta_rule/backward_decays.cuh"
#include "delta_rule/backward_operands.cuh"

namespace pyseq::delta_rule {
namespace {

// q k, q b with k a above its diagonal, and a b: scores of the rows' tokens with the columns' before them; the first
// and the last are symmetric. Gradients of scores lie the same way.
enum Score { kQK, kQB, kAB };
constexpr int kScore = kChunk * kStride;   // floats of one

struct alignas(16) Where {   // in shared memory: registers are short
  int64_t row, head, part;
  int64_t first, time, span;    // tokens of the sequence: the first, how many; the span, of kDeltaKeep
  int64_t begin;                // the chunk's first token
  int64_t state, slot;          // the first element of this head's states in s.state; the sequence's first slot
  int64_t unit;
  int count;                    // of tokens in the span
};

template <class S> struct Memory {
  Where where;
  alignas(16) float G[S::kTiles][S::kValues * kStride];   // transposed: rows are columns of the state
  float v[kChunk * S::kRowStride], dy[kChunk * S::kRowStride];
  float p[kChunk * S::kRowStride], dp[kChunk * S::kRowStride];   // dp: the gradient of p
  float scores[3 * kScore], dscores[3 * kScore];
  float left[S::kWarps][S::kLeft];
  float dg[S::kWarps][kChunk];                // of a decay of a head: of a warp's keys
};

struct Keys { Tile q, k, a, b; };
enum Key { kQ, kK, kA, kB };

// Some tokens of a sequence, one head and some columns of the state.
template <class Policy, class S> struct Span {
  const DeltaRule& s;
  const Plan& p;
  Memory<S>& m;
  int lane, warp;
  int tokens;   // of the chunk

  __device__ __forceinline__ bool corrects() const { return bool(s.a); }
  __device__ __forceinline__ const Where& where() const { return m.where; }
  __device__ __forceinline__ float* own() const { return p.own + blockIdx.x * int64_t(S::kOwn); }
  __device__ __forceinline__ float* state(int chunk, int tile, int n) const {
    return own() + ((chunk * S::kTiles + tile) * S::kValueTiles + n) * 256;
  }
  __device__ __forceinline__ float* kept_scores(int chunk) const { return own() + S::kScores + chunk * 768; }
  __device__ __forceinline__ float* kept_p(int chunk) const {
    return own() + S::kCorrections + chunk * kChunk * S::kValues;
  }
  __device__ __forceinline__ int64_t at(const View& x, int token, int64_t channel) const {
    return where().row * x.stride[0] + (where().begin + token) * x.stride[1] + where().head * x.stride[2] + channel;
  }
  // A warp's keys 16 at a time, and of those the first that this lane has.
  __device__ __forceinline__ int tile(int i) const { return warp * S::kKeyTiles + i; }
  __device__ __forceinline__ int64_t key(int tile) const { return 16 * tile + lane % 4 * 4; }

  template <class T = typename Policy::Data>
  __device__ __forceinline__ Tile load_keys(const View& x, bool wide, int tile) const {
    Tile y;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      Vec<4> four{};
      if (x && token < tokens) four = load_four<T>(x, at(x, token, key(tile)), wide, s.keys - key(tile));
#pragma unroll
      for (int i = 0; i < 4; ++i) y.v[i / 2][2 * half + i % 2] = four[i];
    }
    return y;
  }
  __device__ __forceinline__ void store_keys(const View& x, bool wide, int64_t slab, const Tile& y, int tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      const Vec<4> four{{y.v[0][2 * half], y.v[0][2 * half + 1], y.v[1][2 * half], y.v[1][2 * half + 1]}};
      if (token < tokens && key(tile) < s.keys)
        store_four(x, where().part * slab + at(x, token, key(tile)), four, wide, s.keys - key(tile));
    }
  }
  // q times scale.
  __device__ __forceinline__ Keys load_all(int tile) const {
    Keys x{load_keys(s.q, p.wide_q, tile), load_keys(s.k, p.wide_k, tile), load_keys(s.a, p.wide_a, tile),
           load_keys(s.b, p.wide_b, tile)};
#pragma unroll
    for (int i = 0; i < 8; ++i) x.q.v[i / 4][i % 4] *= s.scale;
    return x;
  }
  // 1 where there is no token or no key.
  __device__ __forceinline__ Tile load_decays(int tile) const {
    const auto decay = [](float g) { return g <= 0.f ? ex2(kLog2e * g) : not_a_number(); };
    if (!s.g) return tile_of([](int) { return 1.f; });
    if (!s.one_decay) {
      const Tile g = load_keys<Any>(p.g, p.wide_g, tile);
      return tile_of([&](int i) { return decay(g.v[i / 4][i % 4]); });
    }
    float w[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      w[half] = token < tokens ? decay(load(p.g, at(p.g, token, 0))) : 1.f;
    }
    return tile_of([&](int i) { return w[i % 4 / 2]; });
  }

  // All threads: v, or dy, into shared memory.
  __device__ __forceinline__ void stage(float* to, const View& x, bool wide) const {
    constexpr int kFours = S::kValues / 4;
#pragma unroll
    for (int i = threadIdx.x; i < kChunk * kFours; i += S::kThreads) {
      const int token = i / kFours, channel = i % kFours * 4;
      const int64_t first = where().part * S::kValues + channel;
      Vec<4> four{};
      if (x && token < tokens) four = load_four<typename Policy::Data>(x, at(x, token, first), wide, s.values - first);
      float* const pair = to + token * S::kRowStride + place_of(channel);
      *reinterpret_cast<float2*>(pair) = {four[0], four[1]};
      *reinterpret_cast<float2*>(pair + 8) = {four[2], four[3]};
    }
  }

  // Element i of a transposed state: its place in s.state and the like, from `head`'s first element on; -1: not there.
  __device__ __forceinline__ int64_t place(int tile, int n, int i) const {
    const int64_t k = key(tile) + i / 4 * 2 + i % 2;
    const int64_t v = where().part * S::kValues + 16 * n + channel_of(row_of(lane, i));
    return k < s.keys && v < s.values ? k * s.values + v : -1;
  }
  __device__ __forceinline__ Tile load_state(const float* from, int tile, int n) const {
    return tile_of([&](int i) {
      const int64_t to = place(tile, n, i);
      return from && to >= 0 ? from[to] : 0.f;
    });
  }
  __device__ __forceinline__ void store_state(float* to, const Tile& x, int tile, int n) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t at = place(tile, n, i);
      if (at >= 0) to[at] = x.v[i / 4][i % 4];
    }
  }

  // To a chunk of the span; all before is done.
  __device__ __forceinline__ void move(int chunk) {
    __syncthreads();
    if (threadIdx.x == 0) m.where.begin = where().first + where().span * kDeltaKeep + chunk * kChunk;
    tokens = min(where().count - chunk * kChunk, kChunk);
    lane = opaque(lane);   // or addresses take registers all along
    __syncthreads();
  }
  // Sum over warps of what they left at `from`.
  __device__ __forceinline__ Tile sum_left(int from) const {
    Tile sum = get(m.left[0] + from, lane);
#pragma unroll
    for (int w = 1; w < S::kWarps; ++w) {
      const Tile more = get(m.left[w] + from, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum.v[i / 4][i % 4] += more.v[i / 4][i % 4];
    }
    return sum;
  }
  __device__ __forceinline__ void put_score(float* to, int f, const Vec<4>& x) const {   // f: of the 192 fours of put()
    const int score = f / 64, i = f / 32 % 2 * 4, l = f % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const row = to + score * kScore + row_of(l, i + 2 * half) * kStride + column_of(l, i);
      *reinterpret_cast<float2*>(row) = {x[2 * half], x[2 * half + 1]};
    }
  }
};

}  // namespace
}  // namespace pyseq::delta_rule
