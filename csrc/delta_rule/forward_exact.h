// The forward token by token, in the arithmetic of the step. The columns of a unit are few enough for their state to
// stay in the first-level cache, which a token reads and writes once: with the row of the state after it in registers,
// the p of the next token gets its term too.
#pragma once
#include "delta_rule/sequence.h"
#include "delta_rule/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kBlock = 8;   // tokens whose rows lie in the first-level cache too; divides kDeltaKeep

struct Block {
  int64_t width;         // whole vectors of K
  int64_t columns;       // of a unit, whole vectors
  float* S;              // groups of [K, columns of the group]
  float *q, *k, *b, *decay;   // [kBlock, width]
  float* a;              // [kBlock + 1, width]: that of the next token too
  int32_t* kept;         // [kBlock, width]
  float *v, *p;          // [kBlock, columns]; [columns]: p of the token to come

  static int64_t size(const DeltaRule& s, int64_t columns) {
    const int64_t width = whole_vectors(s.keys);
    return s.keys * columns + (6 * kBlock + 1) * width + (kBlock + 1) * columns;
  }
  Block(const DeltaRule& s, int64_t most) : width(whole_vectors(s.keys)), columns(most) {
    S = s.scratch;
    q = S + s.keys * columns;
    k = q + kBlock * width;
    b = k + kBlock * width;
    decay = b + kBlock * width;
    kept = reinterpret_cast<int32_t*>(decay + kBlock * width);
    a = decay + 2 * kBlock * width;
    v = a + (kBlock + 1) * width;
    p = v + kBlock * columns;
  }
  TokenRows rows(int64_t t) const {
    return {q + t * width, k + t * width, a + (t + 1) * width, b + t * width, decay + t * width, kept + t * width};
  }
};

// 64 columns, or 32 where a few heads have to do for all threads.
int64_t columns_of_unit(const DeltaRule& s) {
  return std::min<int64_t>(whole_vectors(s.values), s.sequences * s.heads < 4 ? 32 : 64);
}

void load_decays(const DeltaRule& s, const Block& b, const Unit& u, int64_t t, int64_t tokens) {
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t k = 0; k < s.keys; k += W) {
      vf decay;
      vi kept;
      decay_of(log_decay(s, u, t + i, k), decay, kept);
      store(b.decay + i * b.width + k, decay);
      std::memcpy(b.kept + i * b.width + k, &kept, sizeof kept);
    }
  }
}

// Tokens [t, t + tokens). `further`: another one follows.
void load_block(const DeltaRule& s, const Block& b, const Unit& u, int64_t t, int64_t tokens, bool further) {
  load_rows(b.q, s.q, u.at(s.q, t), s.q.stride[1], tokens, s.keys);
  load_rows(b.k, s.k, u.at(s.k, t), s.k.stride[1], tokens, s.keys);
  load_rows(b.v, s.v, u.at(s.v, t) + u.column, s.v.stride[1], tokens, u.columns);
  if (s.a) load_rows(b.a, s.a, u.at(s.a, t), s.a.stride[1], tokens + further, s.keys);
  if (s.a) load_rows(b.b, s.b, u.at(s.b, t), s.b.stride[1], tokens, s.keys);
  if (s.a && !further) std::fill_n(b.a + tokens * b.width, b.width, 0.f);
  if (s.g) load_decays(s, b, u, t, tokens);
}

// C vectors from column c, tokens [t, t + tokens).
template <bool corrected, bool decayed, int C>
void advance(const DeltaRule& s, const Block& b, const Unit& u, int64_t t, int64_t tokens, int64_t c) {
  const int64_t wide = whole_vectors(u.columns);
  float* const S = b.S + c * s.keys;
  vf p[C] = {};
  if constexpr (corrected) for (int i = 0; i < C; ++i) p[i] = load(b.p + c + i * W);
  for (int64_t n = 0; n < tokens; ++n) {
    const TokenRows x = b.rows(n);
    vf v[C], y[C] = {}, next[C] = {};
    for (int i = 0; i < C; ++i) v[i] = load(b.v + n * wide + c + i * W);
    for (int64_t k = 0; k < s.keys; ++k) {
      vf row[1][C];
      load_tile(row, S + k * C * W, C * W);
      take_row<corrected, decayed>(row[0], y, p, v, x, k);
      if constexpr (corrected) correct_row(next, row[0], x.a[k]);
      store_tile(S + k * C * W, C * W, row);
    }
    const int64_t at = u.at(s.y, t + n) + u.column + c;
    for (int i = 0; i < C; ++i) {
      p[i] = next[i];
      if (c + i * W < u.columns) store(s.y, at + i * W, s.scale * y[i], u.columns - c - i * W);
    }
  }
  if constexpr (corrected) for (int i = 0; i < C; ++i) store(b.p + c + i * W, p[i]);
}

// p of the first token.
template <int C> void begin(const DeltaRule& s, const Block& b, int64_t c) {
  vf p[C] = {};
  for (int64_t k = 0; k < s.keys; ++k) {
    vf row[1][C];
    load_tile(row, b.S + c * s.keys + k * C * W, C * W);
    correct_row(p, row[0], b.a[k]);
  }
  for (int i = 0; i < C; ++i) store(b.p + c + i * W, p[i]);
}

// Between the groups of a unit and the rows of a tensor of states, at the unit's first column.
void load_state(const DeltaRule& s, const Block& b, const Unit& u, const float* from) {
  for_groups(whole_vectors(u.columns), [&]<int C>(int64_t c) {
    for (int64_t k = 0; k < s.keys; ++k) {
      for (int64_t i = 0; i < C * W; i += W) {
        const int64_t left = u.columns - c - i;
        store(b.S + c * s.keys + k * C * W + i, from && left > 0 ? load(from + k * s.values + c + i, left) : vf{});
      }
    }
  });
}
void store_state(const DeltaRule& s, const Block& b, const Unit& u, float* to) {
  for_groups(whole_vectors(u.columns), [&]<int C>(int64_t c) {
    for (int64_t k = 0; k < s.keys; ++k) {
      for (int64_t i = 0; i < C * W && c + i < u.columns; i += W) {
        store(to + k * s.values + c + i, load(b.S + c * s.keys + k * C * W + i), u.columns - c - i);
      }
    }
  });
}

template <bool corrected, bool decayed> void forward_exactly(const DeltaRule& s, const Unit& u) {
  const Block b(s, columns_of_unit(s));
  load_state(s, b, u, s.state ? s.state + state_at(s, u, u.sequence) : nullptr);
  for (int64_t t = u.begin; t < u.end; t += kBlock) {
    const int64_t tokens = std::min(kBlock, u.end - t);
    if (float* const to = kept_at(s, u, t)) store_state(s, b, u, to);
    load_block(s, b, u, t, tokens, t + tokens < u.end);
    for_groups(whole_vectors(u.columns), [&]<int C>(int64_t c) {
      if (corrected && t == u.begin) begin<C>(s, b, c);
      advance<corrected, decayed, C>(s, b, u, t, tokens, c);
    });
  }
  if (s.state_out) store_state(s, b, u, s.state_out + state_at(s, u, u.sequence));
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
