// One token, and the walk over sequences and chunks. Forward, backward and step share it, hence their equal bits.
#pragma once
#include "cpu/simd.h"
#include "ema/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline vf remain(vf p, vf y) {   // (1 - p) y
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  return fma(-p, y, y);
#else   // not fused, y - p y loses what p y was rounded by; from p = 1/2 on 1 - p is exact
  return select(p > 0.5f, (1.f - p) * y, y - p * y);
#endif
}
inline vf next(vf p, vf x, vf y) { return fma(p, x, remain(p, y)); }

constexpr int kVectors = kEmaBlock / W;

// Some neighbouring channels of a row of the batch.
struct Block {
  int64_t row, index, channel, channels;

  Block(const Ema& s, int64_t unit)
      : row(unit / ema_blocks(s.dim)), index(unit % ema_blocks(s.dim)), channel(index * kEmaBlock),
        channels(channel + kEmaBlock <= s.dim ? kEmaBlock : s.dim - channel) {}

  template <class E> E* at(const View& x, int64_t t) const {
    return static_cast<E*>(x.data) + row * x.stride[0] + t * x.stride[1] + channel;
  }
  float* kept(const Ema& s, int64_t t) const {   // before token t, a multiple of kEmaChunk
    return s.kept + (row * ema_chunks(s.time) + t / kEmaChunk - 1) * s.dim + channel;
  }
};

// f(v, lanes) for every vector of a block. A block that is `whole` keeps its vectors in registers.
template <bool whole, class F> inline void each_vector(const Block& block, F f) {
  if constexpr (whole) {
#pragma GCC unroll 32
    for (int64_t v = 0; v < kVectors; ++v) f(v, int64_t(W));
  } else {
    for (int64_t v = 0; v * W < block.channels; ++v) f(v, block.channels - v * W);
  }
}

// The states of a block in a [S, D] tensor: zeros where there is none; and back. Lanes without a channel carry zeros, or NaN
// where p makes NaN of zero, and of all else.
template <bool whole> inline void load_states(vf (&to)[kVectors], const float* from, const Block& block) {
  each_vector<whole>(block, [&](int64_t v, int64_t lanes) { to[v] = from ? load(from + v * W, lanes) : vf{}; });
}
template <bool whole> inline void store_states(float* to, const vf (&from)[kVectors], const Block& block) {
  each_vector<whole>(block, [&](int64_t v, int64_t lanes) { store(to + v * W, from[v], lanes); });
}
inline float* of_sequence(float* states, const Ema& s, const Block& block, int64_t sequence) {
  return states ? states + sequence * s.dim + block.channel : nullptr;
}
inline const float* of_sequence(const float* states, const Ema& s, const Block& block, int64_t sequence) {
  return states ? states + sequence * s.dim + block.channel : nullptr;
}

// Tokens [begin, end) of a row; `index` is the sequence's own.
struct Sequence { int64_t index, begin, end; };
inline int64_t sequences_of_row(const Ema& s) { return s.cu_seqlens ? s.sequences : 1; }
inline Sequence sequence_at(const Ema& s, const Block& block, int64_t i) {
  return s.cu_seqlens ? Sequence{i, s.cu_seqlens[i], s.cu_seqlens[i + 1]} : Sequence{block.row, 0, s.time};
}

// p of at most kEmaChunk tokens as floats.
inline void load_weights(float (&to)[kEmaChunk], const Ema& s, const Block& block, int64_t t, int64_t tokens) {
  const int64_t at = block.row * s.p.stride[0] + t;
  for (int64_t i = 0; i < kEmaChunk; i += W) {
    if (i < tokens) store(to + i, load(s.p, at + i, tokens - i));
  }
}

// The rows that come next are no stream that the hardware foresees. A prefetch past the end does not fault.
template <class E> inline void fetch(const E* row) {
  for (int64_t i = 0; i < kEmaBlock; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(row + i);
}

// f<E, whole>() for the dtype of x and whether the block is a whole one.
template <class F> inline void for_block(const Ema& s, const Block& block, F f) {
  const auto with = [&]<class E>(E) {
    block.channels == kEmaBlock ? f.template operator()<E, true>() : f.template operator()<E, false>();
  };
  s.x.type == DType::f32 ? with(0.f) : s.x.type == DType::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
