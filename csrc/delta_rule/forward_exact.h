// The forward token by token, in the arithmetic of the step. The columns of a unit go in groups whose state stays in
// the first-level cache while a block of tokens passes. A token reads and writes it once: with a row of it in
// registers, the p of the next token gets its term too. Without a correction several tokens pass at once.
#pragma once
#include "delta_rule/sequence.h"
#include "delta_rule/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kBlock = 4;                 // tokens; divides kDeltaKeep
constexpr int kColumns = 2;                   // vectors of columns of a group
constexpr int kTogether = W == 16 ? 4 : 2;    // tokens at once without a correction

// Rows of K float32 numbers, one a token: in the tensor itself, or in scratch where it has another dtype.
struct Rows {
  const float* at = nullptr;
  int64_t stride = 0;
  float* scratch;             // [kBlock + 1, width]
};

struct Block {
  int64_t width;              // whole vectors of K
  int64_t columns;            // of a unit, whole vectors
  float* S;                   // groups of [K, columns of the group]
  Rows q, k, a, b;            // of tokens; a's of the next one too
  float* decay;               // [kBlock, width]
  int32_t* kept;              // [kBlock, width]
  float *v, *p;               // [kBlock, columns]; [columns]: p of the token to come
  int64_t known = 0;          // rows of a
  bool slow[kBlock];          // all decays of the token are

  static int64_t size(const DeltaRule& s, int64_t columns) {
    const int64_t width = whole_vectors(s.keys);
    return s.keys * columns + (4 * (kBlock + 1) + 2 * kBlock) * width + (kBlock + 1) * columns;
  }
  Block(const DeltaRule& s, int64_t most) : width(whole_vectors(s.keys)), columns(most) {
    S = s.scratch;
    float* at = S + s.keys * columns;
    for (Rows* rows : {&q, &k, &a, &b}) rows->scratch = at, at += (kBlock + 1) * width;
    decay = at;
    kept = reinterpret_cast<int32_t*>(decay + kBlock * width);
    v = decay + 2 * kBlock * width;
    p = v + kBlock * columns;
  }
  TokenRows rows(int64_t t) const {
    const auto row = [](const Rows& x, int64_t i) { return x.at + i * x.stride; };
    return {row(q, t), row(k, t), row(a, t + (t + 1 < known)), row(b, t), decay + t * width, kept + t * width};
  }
};

// All columns, or 32 where heads alone would not do for all threads.
int64_t columns_of_unit(const DeltaRule& s) {
  const int64_t all = whole_vectors(s.values);
  return s.sequences * s.heads < kFewHeads ? std::min<int64_t>(all, 32) : all;
}

// Calls f.operator()<C>(c) for groups of C vectors from column c.
template <class F> void for_groups(int64_t columns, const F& f) {
  int64_t c = 0;
  for (; c + kColumns * W <= columns; c += kColumns * W) f.template operator()<kColumns>(c);
  if (c < columns) f.template operator()<1>(c);
}

void load_decays(const DeltaRule& s, Block& b, const Unit& u, int64_t t, int64_t tokens) {
  for (int64_t i = 0; i < tokens; ++i) {
    b.slow[i] = true;
    for (int64_t k = 0; k < s.keys; k += W) {
      vf decay;
      vi kept;
      b.slow[i] &= decay_of(log_decay(s, u, t + i, k), decay, kept);
      store(b.decay + i * b.width + k, decay);
      std::memcpy(b.kept + i * b.width + k, &kept, sizeof kept);
    }
  }
}

void load_tokens(const DeltaRule& s, Rows& rows, const View& x, const Unit& u, int64_t t, int64_t tokens) {
  if (x.type == DType::f32) {
    rows.at = static_cast<const float*>(x.data) + u.at(x, t);
    rows.stride = x.stride[1];
  } else {
    load_rows(rows.scratch, x, u.at(x, t), x.stride[1], tokens, s.keys);
    rows.at = rows.scratch;
    rows.stride = whole_vectors(s.keys);
  }
}

// Tokens [t, t + tokens).
void load_block(const DeltaRule& s, Block& b, const Unit& u, int64_t t, int64_t tokens) {
  load_tokens(s, b.q, s.q, u, t, tokens);
  load_tokens(s, b.k, s.k, u, t, tokens);
  load_rows(b.v, s.v, u.at(s.v, t) + u.column, s.v.stride[1], tokens, u.columns);
  b.known = std::min(tokens + 1, u.end - t);
  if (s.a) load_tokens(s, b.a, s.a, u, t, b.known);
  if (s.a) load_tokens(s, b.b, s.b, u, t, tokens);
  if (s.g) load_decays(s, b, u, t, tokens);
}

// N tokens, number n of the block and on, for C vectors from column c: y goes to rows of v, which is no longer needed.
template <bool corrected, Decay decay, int C, int N>
void advance(const DeltaRule& s, const Block& b, int64_t wide, int64_t n, int64_t c) {
  static_assert(N == 1 || !corrected, "p of a token is known when the whole state before it is");
  float *const S = b.S + c * s.keys, *const rows = b.v + n * wide + c;
  TokenRows x[N];
  vf p[C] = {}, next[C] = {}, v[N][C], y[N][C] = {};
  for (int i = 0; i < N; ++i) x[i] = b.rows(n + i);
  for (int i = 0; i < C && corrected; ++i) p[i] = load(b.p + c + i * W);
  load_tile(v, rows, wide);
  for (int64_t k = 0; k < s.keys; ++k) {
    vf row[1][C];
    load_tile(row, S + k * C * W, C * W);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) take_row<corrected, decay>(row[0], y[i], p, v[i], x[i], k);
    if constexpr (corrected) correct_row(next, row[0], x[0].a[k]);
    store_tile(S + k * C * W, C * W, row);
  }
  store_tile(rows, wide, y);
  for (int i = 0; i < C && corrected; ++i) store(b.p + c + i * W, next[i]);
}
template <bool corrected, bool decayed, int C>
void advance(const DeltaRule& s, const Block& b, int64_t wide, int64_t tokens, int64_t c) {
  constexpr int most = corrected ? 1 : kTogether;
  constexpr Decay slow = decayed ? Decay::slow : Decay::none, any = decayed ? Decay::any : Decay::none;
  int64_t n = 0;
  for (; n + most <= tokens; n += most) {
    if (decayed && std::all_of(b.slow + n, b.slow + n + most, [](bool x) { return x; })) {
      advance<corrected, slow, C, most>(s, b, wide, n, c);
    } else {
      advance<corrected, any, C, most>(s, b, wide, n, c);
    }
  }
  for (; n < tokens; ++n) advance<corrected, any, C, 1>(s, b, wide, n, c);
}

// p of the first token.
template <int C> void begin(const DeltaRule& s, const Block& b, int64_t c) {
  vf p[C] = {};
  for (int64_t k = 0; k < s.keys; ++k) {
    vf row[1][C];
    load_tile(row, b.S + c * s.keys + k * C * W, C * W);
    correct_row(p, row[0], b.a.at[k]);
  }
  for (int i = 0; i < C; ++i) store(b.p + c + i * W, p[i]);
}

void store_block(const DeltaRule& s, const Block& b, const Unit& u, int64_t t, int64_t tokens) {
  const int64_t wide = whole_vectors(u.columns);
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t at = u.at(s.y, t + i) + u.column;
    for (int64_t c = 0; c < u.columns; c += W) {
      store(s.y, at + c, s.scale * load(b.v + i * wide + c), u.columns - c);
    }
  }
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
  Block b(s, columns_of_unit(s));
  const int64_t wide = whole_vectors(u.columns);
  load_state(s, b, u, s.state ? s.state + state_at(s, u, u.sequence) : nullptr);
  for (int64_t t = u.begin; t < u.end; t += kBlock) {
    const int64_t tokens = std::min(kBlock, u.end - t);
    if (float* const to = kept_at(s, u, t)) store_state(s, b, u, to);
    load_block(s, b, u, t, tokens);
    for_groups(wide, [&]<int C>(int64_t c) {
      if (corrected && t == u.begin) begin<C>(s, b, c);
      advance<corrected, decayed, C>(s, b, wide, tokens, c);
    });
    store_block(s, b, u, t, tokens);
  }
  if (s.state_out) store_state(s, b, u, s.state_out + state_at(s, u, u.sequence));
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
