// A chunk of 16 tokens in the scratch of a thread: its rows in float32, padded with tokens that do nothing, and decayed.
#pragma once
#include <algorithm>

#include "cpu/tile.h"
#include "delta_rule/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kTokens = 16;
constexpr int kChunks = kDeltaKeep / kTokens;   // between two kept states

// Where things lie: `from` is null while their sizes are counted.
struct Scratch {
  float* from;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* const p = from ? from + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return p;
  }
};

// Sizes of the matrices: rows of whole vectors over keys and over values.
struct Sizes {
  int64_t keys, values, key_width, value_width;
  bool corrected;
  int scores;   // between two tokens: Aqk, Aqb, Aak, Aab, or Aqk alone

  explicit Sizes(const DeltaRule& s)
      : keys(s.keys), values(s.values), key_width(whole_vectors(s.keys)), value_width(whole_vectors(s.values)),
        corrected(s.a), scores(corrected ? 4 : 1) {}
};

enum Score { qk, qb, ak, ab };

struct Chunk {
  float *q, *k, *a, *b;              // [16, K]
  float* decay;                      // [16, K]: exp(g)
  float *q_in, *a_in;                // [16, K]: Q exp(gi), A exp(ge)
  float *k_out, *b_out;              // [16, K]: K exp(gl - gi), B exp(gl - gi)
  float* whole;                      // [K]: exp(gl), in the form of update.h, with what is kept
  int32_t* kept;                     // [K]
  float* v;                          // [16, V], and behind it
  float* p;                          // [16, V]
  float* scores;                     // [j, i, scores], j <= i
  float* state;                      // [K, V], before the chunk

  Chunk() = default;
  Chunk(const Sizes& z, Scratch& m) {
    const int64_t rows = kTokens * z.key_width;
    for (float** x : {&q, &k, &decay, &q_in, &k_out}) *x = m.take(rows);
    for (float** x : {&a, &b, &a_in, &b_out}) *x = z.corrected ? m.take(rows) : nullptr;
    whole = m.take(z.key_width);
    kept = reinterpret_cast<int32_t*>(m.take(z.key_width));
    v = m.take((z.corrected ? 2 : 1) * kTokens * z.value_width);
    p = z.corrected && v ? v + kTokens * z.value_width : nullptr;
    scores = m.take(kTokens * kTokens * z.scores);
    state = m.take(z.keys * z.value_width);
  }
};

// Tokens [begin, begin + tokens) of a row of the batch in one head.
struct Place {
  int64_t row, begin, tokens, head;
  int64_t at(const View& x, int64_t t = 0) const {
    return row * x.stride[0] + (begin + t) * x.stride[1] + head * x.stride[2];
  }
  int64_t one_at(const View& x, int64_t t) const {   // one number per head, along the last axis
    return row * x.stride[0] + (begin + t) * x.stride[1] + head;
  }
};

// Rows of tensors on their way to the core, a few at a time while something else is computed: those of one head lie too
// far apart for the machine to see them coming.
struct Ahead {
  struct Rows {
    View x;
    Place place;
    int64_t columns;
    bool write;
  };
  Rows rows[14];
  int64_t count = 0, fetched = 0;   // fetched: tokens of rows[count - 1], which are the next

  void add(const View& x, const Place& place, int64_t columns, bool write) {
    if (x && place.tokens > 0) rows[count++] = {x, place, columns, write};
  }
  void fetch(int64_t n) {   // n tokens
    for (; n > 0 && count > 0; --n) {
      const Rows& r = rows[count - 1];
      const char* const from = static_cast<const char*>(r.x.at(r.place.at(r.x, fetched)));
      for (int64_t i = 0; i < r.columns * size_of(r.x.type); i += 64) {
        if (r.write) __builtin_prefetch(from + i, 1, 3);
        else __builtin_prefetch(from + i, 0, 2);
      }
      if (++fetched == r.place.tokens) --count, fetched = 0;
    }
  }
};

inline void read_rows(float* to, const View& x, const Place& here, int64_t columns) {
  const int64_t width = whole_vectors(columns);
  const int64_t tokens = x ? here.tokens : 0;
  if (tokens) load_rows(to, x, here.at(x), x.stride[1], tokens, columns);
  std::fill_n(to + tokens * width, (kTokens - tokens) * width, 0.f);
}

// g, or one number per head on every key; 0 without
inline void read_gates(const DeltaRule& s, const Sizes& z, const Place& here, float* g) {
  if (!s.one_decay) return read_rows(g, s.g, here, z.keys);
  for (int64_t t = 0; t < kTokens; ++t) {
    const float one = t < here.tokens ? load(s.g, here.one_at(s.g, t), 1)[0] : 0.f;
    std::fill_n(g + t * z.key_width, z.key_width, one);
  }
}

// The decays in place of g, NaN where it is not <= 0, and the rows decayed from the state before the chunk and to that
// after it: running products, nothing is divided.
inline void decay_rows(const Sizes& z, const Chunk& c) {
  for (int64_t d = 0; d < z.key_width; d += W) {
    vf gl{}, L = splat(1.f), R = L;
    for (int64_t i = 0; i < kTokens; ++i) {
      const int64_t at = i * z.key_width + d;
      const vf given = load(c.decay + at), g = select(given <= 0.f, given, splat(NAN)), decay = exp(g);
      gl += g;
      store(c.decay + at, decay);
      if (z.corrected) store(c.a_in + at, load(c.a + at) * L);
      L *= decay;
      store(c.q_in + at, load(c.q + at) * L);
    }
    vf whole;
    vi kept;
    decay_of(gl, whole, kept);
    store(c.whole + d, whole);
    std::memcpy(c.kept + d, &kept, sizeof kept);
    for (int64_t j = kTokens - 1; j >= 0; --j) {
      const int64_t at = j * z.key_width + d;
      store(c.k_out + at, load(c.k + at) * R);
      if (z.corrected) store(c.b_out + at, load(c.b + at) * R);
      R *= load(c.decay + at);
    }
  }
}

inline void read_chunk(const DeltaRule& s, const Sizes& z, const Place& here, const Chunk& c) {
  read_rows(c.q, s.q, here, z.keys);
  read_rows(c.k, s.k, here, z.keys);
  if (z.corrected) read_rows(c.a, s.a, here, z.keys);
  if (z.corrected) read_rows(c.b, s.b, here, z.keys);
  read_rows(c.v, s.v, here, z.values);
  read_gates(s, z, here, c.decay);
  decay_rows(z, c);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
