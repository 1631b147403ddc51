// One token of the recurrence, and how a tile of channels is brought in and out. Forward, backward and step share it,
// which is what makes them agree bit for bit.
#pragma once
#include "cpu/simd.h"
#include "selective_scan/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// W channels of one group, or the fewer that are left of it: the lanes of a vector. Lanes that hold no channel carry zeros.
struct Tile { int64_t channel, lanes, group; };

inline int64_t tiles_of_group(int64_t dim, int64_t groups) { return (dim / groups + W - 1) / W; }

inline Tile tile_at(int64_t dim, int64_t groups, int64_t i) {
  const int64_t channels = dim / groups, per_group = tiles_of_group(dim, groups);
  const int64_t group = i / per_group, first = i % per_group * W;
  return {group * channels + first, first + W <= channels ? W : channels - first, group};
}

inline vf decay(vf delta, vf A) { return exp2(delta * A); }   // A is pre-scaled by log2 e
inline vf next(vf a, vf h, vf du, vf B) { return fma(a, h, du * B); }

// States [n, n + NB) of one token: advances h and adds <C, h> to y. A is pre-scaled by log2 e: [N, W]; B and C are rows of N;
// du = delta u. With Keep, exp(delta A) and h are left in kept: [2, NB, W].
template <int NB, bool Keep = false>
inline vf advance(vf (&h)[NB], const float* A, const float* B, const float* C, vf delta, vf du, vf y, float* kept = nullptr) {
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) {
    const vf a = decay(delta, load(A + n * W));
    h[n] = next(a, h[n], du, splat(B[n]));
    y = fma(h[n], splat(C[n]), y);
    if constexpr (Keep) {
      store(kept + n * W, a);
      store(kept + (NB + n) * W, h[n]);
    }
  }
  return y;
}

// States [n, n + W) of a tile with one state per vector, from rows of N states `stride` apart; and back. Zeros behind N.
template <class T>
inline void load_states(vf (&to)[W], const T* from, int64_t stride, int64_t states, int64_t lanes, int64_t n) {
  for (int64_t i = 0; i < W; ++i) to[i] = i < lanes ? load(from + i * stride + n, states - n) : vf{};
  transpose(to);
}
template <class T>
inline void store_states(T* to, int64_t stride, vf (&from)[W], int64_t states, int64_t lanes, int64_t n) {
  transpose(from);
  for (int64_t i = 0; i < lanes; ++i) store(to + i * stride + n, from[i], states - n);
}

// All states of a tile, [lanes, N] to [padded(N), W], times scale; and back.
inline void load_tile(float* to, const float* from, int64_t states, int64_t lanes, float scale) {
  const int64_t width = padded(states);
  for (int64_t n = 0; n < width; n += W) {
    vf row[W] = {};
    if (n < states) load_states(row, from, states, states, lanes, n);
    for (int64_t i = 0; i < W && n + i < width; ++i) store(to + (n + i) * W, row[i] * scale);
  }
}
inline void store_tile(float* to, const float* from, int64_t states, int64_t lanes) {
  for (int64_t n = 0; n < states; n += W) {
    vf row[W] = {};
    for (int64_t i = 0; i < W && n + i < states; ++i) row[i] = load(from + (n + i) * W);
    store_states(to, states, row, states, lanes, n);
  }
}

inline vf load_or(const float* p, int64_t channel, int64_t lanes, float otherwise) {
  return p ? load(p + channel, lanes) : splat(otherwise);
}

// Where channel c of token t of row b of x [B, T, D] is.
inline int64_t at(const View& x, int64_t b, int64_t t, int64_t c) { return b * x.stride[0] + t * x.stride[1] + c; }

// The rows of x [B, T, D] that come next are brought in while this tile computes: otherwise a third of the time is waiting.
template <int K>
struct Ahead {
  const char* row[K];
  int64_t step[K];   // bytes to the next token

  Ahead(const View* const (&x)[K], int64_t b, int64_t t, int64_t channel) {
    for (int i = 0; i < K; ++i) {
      const View& v = *x[i] ? *x[i] : *x[0];
      row[i] = static_cast<const char*>(v.at(at(v, b, t, channel)));
      step[i] = v.stride[1] * size_of(v.type);
    }
  }
  void fetch(int64_t t) const {
    for (int i = 0; i < K; ++i) __builtin_prefetch(row[i] + t * step[i]);
  }
};

// Rows of B or C [B, T, G, N] to float32 rows of padded(N), zeros behind. The last store may run W - 8 floats over the end.
inline void load_shared(float* to, const View& x, int64_t row, int64_t begin, int64_t tokens, int64_t group, int64_t states) {
  const int64_t width = padded(states);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = row * x.stride[0] + (begin + t) * x.stride[1] + group * x.stride[2];
    for (int64_t n = 0; n < width; n += W) store(to + t * width + n, load(x, at + n, n < states ? states - n : 0));
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
