// What a unit of the forward works in, and the parts of its products that are common to its heads: <C, B>, and C as an
// operand of <C, S>, as float32 or as pairs of bfloat16.
#pragma once
#include <algorithm>
#include <type_traits>

#include "ssd/chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kMostHeads = 16;           // of a unit: they share <C, B> of a chunk
constexpr int64_t kMostState = 128 * 1024;   // floats: the states of a unit stay in the second-level cache

inline int64_t heads_of_unit(const Ssd& s) {
  int64_t best = 1;
  double least = 1e300;
  const int64_t room = kMostState / (s.states * whole_vectors(s.width));
  for (int64_t heads = 1; heads <= std::clamp<int64_t>(room, 1, kMostHeads); ++heads) {
    const int64_t units = s.sequences * s.groups * blocks_of_group(s, heads);
    const double cost = double((units + s.threads - 1) / s.threads) * (double(heads) + 0.3);   // 0.3: <C, B>
    if (cost <= least) least = cost, best = heads;
  }
  return best;
}

// Of few states there is little to multiply.
inline bool in_pairs(const Ssd& s) { return s.dot && s.states >= 32; }

inline int64_t chunk_of(const Ssd& s) { return s.chunk ? s.chunk : 64; }

// What a unit keeps, and one chunk of it. Widths are whole vectors.
struct Chunk {
  int64_t tokens_width, states_width, width;
  float* S;                        // [heads, N, width]: transposed, so that the channels are the lanes
  float* B;                        // [Q, states_width]
  float *C, *Bt;                   // [Q, states_width], [N, tokens_width]; of pairs, half as wide and as long
  float* pairs;                    // [N, width]: S in pairs, see pair_states
  float *scores, *M;               // [Q, tokens_width]: <C, B>, and what x is multiplied by
  float* x;                        // [Q, width]
  float *delta, *log_a, *steps;    // [heads, tokens_width], the same, work
  float* y;                        // a tile
  int64_t size;

  Chunk(const Ssd& s, float* scratch) {
    Scratch from{scratch};
    const int64_t Q = chunk_of(s), heads = heads_of_unit(s);
    tokens_width = whole_vectors(Q), states_width = whole_vectors(s.states), width = whole_vectors(s.width);
    S = from.take(heads * s.states * width);
    B = from.take(Q * states_width);
    C = from.take(Q * states_width);
    Bt = from.take(s.states * tokens_width);
    pairs = from.take(in_pairs(s) ? (s.states + 1) * width : 0);
    scores = from.take(Q * tokens_width);
    M = from.take(Q * tokens_width);
    x = from.take(Q * width);
    delta = from.take(heads * tokens_width);
    log_a = from.take(heads * tokens_width);
    steps = from.take(2 * Q * whole_vectors(heads));
    y = from.take(kTileRows * kTileVectors * W);
    size = from.used;
  }
};

// C, and B transposed, as a product over the states reads them: load_operands<Pairs> takes them as they are.
template <class P> void load_operands(const Ssd& s, const Chunk& c, int64_t B, int64_t C, int64_t tokens) {
  if constexpr (std::is_same_v<P, Singles>) {
    load_rows(c.C, s.C, C, s.C.stride[1], tokens, s.states);
    transpose_rows(c.Bt, c.tokens_width, c.B, c.states_width, tokens, s.states);
  } else {
    const int64_t words = P::words(s.states), width = whole_vectors(words);
    const auto copy = [&](float* to, const View& v, int64_t at) {
      for (int64_t t = 0; t < tokens; ++t) {
        to[t * width + words - 1] = 0.f;   // the partner of an odd last state
        std::memcpy(to + t * width, v.at(at + t * v.stride[1]), s.states * sizeof(bf16));
      }
    };
    copy(c.C, s.B, B);
    transpose_rows(c.Bt, c.tokens_width, c.C, width, tokens, words);
    copy(c.C, s.C, C);
  }
}

template <class P> void load_chunk(const Ssd& s, const Unit& u, const Chunk& c, int64_t begin, int64_t tokens) {
  const auto at = [&](const View& v) { return u.row * v.stride[0] + begin * v.stride[1] + u.group * v.stride[2]; };
  load_rows(c.B, s.B, at(s.B), s.B.stride[1], tokens, s.states);
  load_operands<P>(s, c, at(s.B), at(s.C), tokens);
  const int64_t words = P::words(s.states), width = whole_vectors(words);
  for_tiles(tokens, tokens, [&]<int R, int K>(int64_t i, int64_t j) {
    if (j >= i + R) return;
    vf sum[R][K] = {};
    multiply<P>(sum, c.C + i * width, width, 1, c.Bt + j, c.tokens_width, words);
    store_tile(c.scores + i * c.tokens_width + j, c.tokens_width, sum);
  });
  load_steps(s, u, begin, tokens, c.delta, c.log_a, c.tokens_width, c.steps);
}

#if defined(__AVX512F__)
inline vf rounded_off(vf v, vf high) { return select((as_int(high) << 1) == splat_int(-1 << 24), vf{}, v - high); }

// S in pairs along the states, rounded; behind them what rounding took: of an infinity, nothing. S rounded alone would
// put as much error into y as its own rounding does, 1.41 times together.
inline void pair_states(const Ssd& s, const Chunk& c, const float* S) {
  const int64_t words = Pairs::words(s.states);
  for (int64_t k = 0; k < words; ++k) {
    for (int64_t p = 0; p < c.width; p += W) {
      const float* at = S + 2 * k * c.width + p;
      const vf even = load(at), odd = 2 * k + 1 < s.states ? load(at + c.width) : vf{};
      const vi word = pair_bf16(even, odd);
      store(c.pairs + k * c.width + p, as_float(word));
      const vf even_rest = rounded_off(even, as_float(word << 16));
      const vi rest = pair_bf16(even_rest, rounded_off(odd, as_float(word & int32_t(0xffff0000))));
      store(c.pairs + (words + k) * c.width + p, as_float(rest));
    }
  }
}
#endif

// sum[r] += <C[i + r], S>, channels from p
template <class P, int R, int K>
[[gnu::always_inline]] inline void multiply_state(vf (&sum)[R][K], const Ssd& s, const Chunk& c, const float* S,
                                                  int64_t i, int64_t p) {
  const int64_t words = P::words(s.states), width = whole_vectors(words);
  if constexpr (std::is_same_v<P, Singles>) {
    multiply(sum, c.C + i * width, width, 1, S + p, c.width, words);
  } else {
    multiply<P>(sum, c.C + i * width, width, 1, c.pairs + p, c.width, words);
    multiply<P>(sum, c.C + i * width, width, 1, c.pairs + words * c.width + p, c.width, words);
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
