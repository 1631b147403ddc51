// What the kernels share on a GPU: one token, which thread has what, rows on their way in, and how warps are joined.
#pragma once
#include "cuda/device.cuh"
#include "cuda/opaque.cuh"
#include "cuda/vector.cuh"
#include "ema/kernel.h"

namespace pyseq {
namespace {

// A block has 64 channels of a row, two a lane, and walks the row in spans of 128 tokens: 16 for each of its warps. So rows
// are cut in time within the block, and each is read once. A warp's row is one line of 128 bytes in 16 bits.
constexpr int kWarps = 8, kThreads = 32 * kWarps, kTokens = int(kEmaChunk), kSpan = kWarps * kTokens;
constexpr int kLane = int(kEmaTile) / 32;   // channels of a lane
using Pair = Vec<kLane>;

__device__ __forceinline__ float remain(float p, float y) { return fmaf(-p, y, y); }   // (1 - p) y
__device__ __forceinline__ float next(float p, float x, float y) { return fmaf(p, x, remain(p, y)); }

__device__ __forceinline__ Pair both(float x) { return {{x, x}}; }
__device__ __forceinline__ Pair remain(float p, const Pair& y) { return {{remain(p, y[0]), remain(p, y[1])}}; }
__device__ __forceinline__ Pair next(float p, const Pair& x, const Pair& y) {
  return {{next(p, x[0], y[0]), next(p, x[1], y[1])}};
}
__device__ __forceinline__ Pair add(const Pair& a, const Pair& b) { return {{a[0] + b[0], a[1] + b[1]}}; }

// Two elements as they lie in memory: what is on its way waits for nothing until it is unpacked.
template <class E> using Raw = typename Word<kLane * sizeof(E)>::type;
template <class E> __device__ __forceinline__ Pair unpack(const Raw<E>& raw) {
  const E* const part = reinterpret_cast<const E*>(&raw);
  return {{load(part), load(part + 1)}};
}

// The channels of this lane, none where it has none, and the first of the 16 tokens of its warp in a span.
struct Place {
  int row, tile, channel, count, lane, warp;

  __device__ __forceinline__ explicit Place(const Ema& s)
      : row(int(blockIdx.x / unsigned(ema_tiles(s.dim)))), tile(int(blockIdx.x % unsigned(ema_tiles(s.dim)))),
        lane(int(threadIdx.x) % 32), warp(int(threadIdx.x) / 32) {
    channel = tile * int(kEmaTile) + lane * kLane;
    count = min(max(int(s.dim) - channel, 0), kLane);
  }
  template <class E> __device__ __forceinline__ E* at(const View& x, int64_t t) const {
    return static_cast<E*>(x.data) + row * x.stride[0] + t * x.stride[1] + channel;
  }
  __device__ __forceinline__ float* kept(const Ema& s, int64_t t) const {   // before token t, a multiple of 16
    return s.kept + (row * ema_chunks(s.time) + t / kTokens - 1) * s.dim + channel;
  }
  // From and to [S, D]: zeros where there is nothing. Rare, so that nothing of it is worth a register ahead of its branch.
  __device__ __forceinline__ Pair load_state(const Ema& s, const float* states, int64_t sequence) const {
    Pair y{};
    if (!states) return y;
    const float* const from = states + sequence * s.dim + opaque(channel);
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < count) y[i] = from[i];
    return y;
  }
  __device__ __forceinline__ void store_state(const Ema& s, float* states, int64_t sequence, const Pair& y) const {
    if (!states) return;
    float* const to = states + sequence * s.dim + opaque(channel);
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      if (i < count) to[i] = y[i];
  }
  // wide: a lane has both of its channels or none, and may access them at once.
  template <class E> __device__ __forceinline__ Raw<E> fetch(const E* from, bool wide) const {
    Raw<E> raw{};
    if (wide) {
      if (count) raw = *reinterpret_cast<const Raw<E>*>(from);
    } else {
      E* const part = reinterpret_cast<E*>(&raw);
      if (count > 0) part[0] = from[0];
      if (count > 1) part[1] = from[1];
    }
    return raw;
  }
  template <class E> __device__ __forceinline__ void put(E* to, const Pair& y, bool wide) const {
    if (wide) {
      if (count) store_vec<kLane>(to, y);
    } else {
      if (count > 0) store(to, y[0]);
      if (count > 1) store(to + 1, y[1]);
    }
  }
};

// Rows t .. t + 15 of x; zeros behind `tokens`.
template <class E>
__device__ __forceinline__ void fetch_rows(Raw<E> (&rows)[kTokens], const View& x, const Place& at, int64_t t, int tokens,
                                           bool wide) {
  const E* from = at.at<const E>(x, t);
#pragma unroll
  for (int i = 0; i < kTokens; ++i, from += x.stride[1]) rows[i] = i < tokens ? at.fetch(from, wide) : Raw<E>{};
}

__device__ __forceinline__ int tokens_from(const Ema& s, int64_t t) {
  return int(min(max(s.time - t, int64_t(0)), int64_t(kTokens)));
}

// p and the sequences of a warp's tokens, a token to each of 16 lanes.
struct Token {
  float p = 0.f;
  int before = -1, own = 0, after = 0;   // sequences of the tokens around

  __device__ __forceinline__ Token(const Ema& s, const Place& at, int64_t t, int tokens) {
    if (at.lane >= tokens) return;
    const int64_t i = t + at.lane;
    p = load(s.p, at.row * s.p.stride[0] + i);
    if (s.sequence_of) {
      before = i ? s.sequence_of[i - 1] : -1;
      own = s.sequence_of[i];
      after = s.sequence_of[i + 1];   // at T there is one more, of none
    } else {
      before = i ? 0 : -1;
      after = i + 1 == s.time;
    }
  }
  __device__ __forceinline__ unsigned starts(int tokens, int lane) const {
    return __ballot_sync(~0u, lane < tokens && own != before);
  }
  __device__ __forceinline__ unsigned ends(int tokens, int lane) const {
    return __ballot_sync(~0u, lane < tokens && own != after);
  }
};

__device__ __forceinline__ int64_t sequence_of(const Ema& s, const Place& at, int64_t t) {
  return s.sequence_of ? s.sequence_of[t] : at.row;
}
__device__ __forceinline__ bool invalid(const Ema& s) { return s.sequence_of && s.sequence_of[0] < 0; }

// 16 tokens make y' = y0 + (1 - f) y of a y that comes to them: y0 from zero, and f, what they forget of it, is a moving
// average of ones with the same weights, so that 1 - f is not rounded either. Where a sequence begins or ends among them,
// nothing of y arrives. Two of these, so that a span may be written while the one before is read.
struct Spans {
  alignas(16) float p[kWarps][kTokens];
  struct {
    alignas(8) float own[kWarps][32 * kLane];
    float forgotten[kWarps];
    int alone[kWarps];
  } of[2];
};

__device__ __forceinline__ void share_weights(Spans& m, const Place& at, float p) {
  __syncwarp();   // of the span before, all have been read
  if (at.lane < kTokens) m.p[at.warp][at.lane] = p;
  __syncwarp();
}
// f(i, p) for the tokens of a warp in their order, or backwards.
template <bool back, class F> __device__ __forceinline__ void each_token(const Spans& m, const Place& at, const F& f) {
#pragma unroll
  for (int k = 0; k < kTokens; k += 4) {
    const int first = back ? kTokens - 4 - k : k;
    const Vec<4> p = load_vec<4>(m.p[at.warp] + first);
#pragma unroll
    for (int j = 0; j < 4; ++j) f(first + (back ? 3 - j : j), p[back ? 3 - j : j]);
  }
}

// Joins the warps of a span in the order of their tokens, backwards if `back`: `y` comes to the first, the result comes to
// this one, and y becomes what leaves the last.
template <bool back>
__device__ __forceinline__ Pair join(Spans& m, int stage, const Place& at, const Pair& own, float forgotten, bool alone,
                                     Pair& y) {
  auto& of = m.of[stage];
  store_vec<kLane>(of.own[at.warp] + at.lane * kLane, own);
  if (at.lane == 0) of.forgotten[at.warp] = forgotten, of.alone[at.warp] = alone;
  __syncthreads();
  Pair mine = y;
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    const int w = back ? kWarps - 1 - k : k;
    if (w == at.warp) mine = y;
    const Pair ends = load_vec<kLane>(of.own[w] + at.lane * kLane), passed = add(ends, remain(of.forgotten[w], y));
    y = of.alone[w] ? ends : passed;
  }
  return mine;
}

// An empty sequence passes its state on: f(sequence) for those of the row, a warp each.
template <class F> __device__ __forceinline__ void each_empty(const Ema& s, const Place& at, const F& f) {
  if (!s.sequence_of) {
    if (s.time == 0 && at.warp == 0) f(at.row);
    return;
  }
  for (int64_t i = at.warp; i < s.sequences; i += kWarps)
    if (s.cu_seqlens[i] == s.cu_seqlens[i + 1]) f(i);
}
// cu_seqlens out of order: NaN for the states, and the rows of y or dx.
template <class E>
__device__ __forceinline__ void fill_nan(const Ema& s, const Place& at, const View& y, float* states, bool wide) {
  for (int64_t t = at.warp; t < s.time; t += kWarps) at.put(at.at<E>(y, t), both(NAN), wide);
  for (int64_t i = at.warp; i < s.sequences; i += kWarps) at.store_state(s, states, i, both(NAN));
}

inline int64_t blocks_of(const Ema& s) { return s.batch * ema_tiles(s.dim); }
inline bool wide_rows(const Ema& s, const View& x) { return s.dim % kLane == 0 && vectorisable(x, kLane, 2); }
constexpr int64_t kLongest = 0x7fffffff;

// f<E>() for the dtype of x, unless the grid would be too large or empty.
template <class F> int for_dtype(const Ema& s, F f) {
  if (blocks_of(s) > kLongest || s.time > kLongest - kSpan || s.dim > kLongest - kEmaTile) return cudaErrorInvalidValue;
  if (blocks_of(s) == 0) return 0;
  switch (s.x.type) {
    case DType::bf16: return f.template operator()<__nv_bfloat16>();
    case DType::f16: return f.template operator()<__half>();
    default: return f.template operator()<float>();
  }
}

}  // namespace
}  // namespace pyseq
