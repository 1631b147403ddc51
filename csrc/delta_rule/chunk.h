// What is inside a chunk of one head, before the state comes in: the decays between tokens, and the products of the
// rows of Q and A with those of K and B (kernel.h has the letters). Forward and backward share it.
#pragma once
#include "delta_rule/sequence.h"
#include "delta_rule/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kChunk = 16;   // divides kDeltaKeep

struct Chunk {
  int64_t tokens, width;         // at most kChunk; whole vectors of K
  float *q, *k, *a, *b;          // [kChunk, width]: as given, zeros behind K
  float* decay;                  // [kChunk, width]: exp(g), 1 without g
  float *q_in, *a_in;            // [kChunk, width]: scale Q exp(gi), A exp(ge)
  float *k_out, *b_out;          // [kChunk, width]: K exp(gl - gi), B exp(gl - gi)
  float* left;                   // [width]: exp(gl), as decay_of gives it
  int32_t* left_kept;
  float *Aqk, *Aqb, *Aak, *Aab;  // [kChunk, kChunk], zeros where nothing is defined
  float* parts;                  // [2, kChunk, kChunk / 4, W]: sums of products before their lanes are added up

  static int64_t size(const DeltaRule& s) {
    return (9 * kChunk + 2) * whole_vectors(s.keys) + 4 * kChunk * kChunk + kChunk * kChunk / 2 * W;
  }
  Chunk(const DeltaRule& s, float* at) : tokens(0), width(whole_vectors(s.keys)) {
    const auto take = [&](int64_t n) { return at += n, at - n; };
    for (float** rows : {&q, &k, &a, &b, &decay, &q_in, &a_in, &k_out, &b_out}) *rows = take(kChunk * width);
    left = take(width);
    left_kept = reinterpret_cast<int32_t*>(take(width));
    for (float** matrix : {&Aqk, &Aqb, &Aak, &Aab}) *matrix = take(kChunk * kChunk);
    parts = at;
  }
};

// exp(g) of every token, and what the chunk leaves of a state: the exponential of the sum, which is closer to it than
// the product, and a long memory is made of many.
inline void load_decays(const DeltaRule& s, const Chunk& c, const Unit& u, int64_t t) {
  for (int64_t d = 0; d < c.width; d += W) {
    vf sum = {}, decay;
    vi kept;
    for (int64_t i = 0; i < c.tokens; ++i) {
      const vf g = log_decay(s, u, t + i, d);
      sum += g;
      store(c.decay + i * c.width + d, exp(at_most_0(g)));
    }
    decay_of(sum, decay, kept);
    store(c.left + d, decay);
    std::memcpy(c.left_kept + d, &kept, sizeof kept);
  }
}

// Tokens [t, t + tokens) of the unit's head.
inline void load_chunk(const DeltaRule& s, Chunk& c, const Unit& u, int64_t t, int64_t tokens) {
  c.tokens = tokens;
  load_rows(c.q, s.q, u.at(s.q, t), s.q.stride[1], tokens, s.keys);
  load_rows(c.k, s.k, u.at(s.k, t), s.k.stride[1], tokens, s.keys);
  if (s.a) load_rows(c.a, s.a, u.at(s.a, t), s.a.stride[1], tokens, s.keys);
  if (s.a) load_rows(c.b, s.b, u.at(s.b, t), s.b.stride[1], tokens, s.keys);
  if (s.g) load_decays(s, c, u, t);
  else std::fill_n(c.decay, tokens * c.width, 1.f);
}

// Rows of Q and A, decayed since the chunk began.
template <bool corrected, bool decayed> void decay_from_start(const DeltaRule& s, const Chunk& c) {
  for (int64_t d = 0; d < c.width; d += W) {
    vf between = splat(s.scale);   // times the decays so far
    vf so_far = splat(1.f);
    for (int64_t i = 0; i < c.tokens; ++i) {
      const int64_t at = i * c.width + d;
      if constexpr (corrected) store(c.a_in + at, decayed ? load(c.a + at) * so_far : load(c.a + at));
      if constexpr (decayed) between *= load(c.decay + at), so_far *= load(c.decay + at);
      store(c.q_in + at, load(c.q + at) * between);
    }
  }
}

// Token i against rows [j, j + R) of `right`, which are tokens before it decayed up to it, and, `own`, against its own:
// the rows are decayed by one token more, sums of q times the row after that, and of a times that before.
template <bool corrected, bool decayed, int R, bool own>
void multiply_token(const Chunk& c, float* right, int64_t i, int64_t j) {
  const float *q = c.q + i * c.width, *a = c.a + i * c.width, *decay = c.decay + i * c.width;
  vf with_q[4] = {}, with_a[4] = {};
  for (int64_t d = 0; d < c.width; d += W) {
    const vf q_d = load(q + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* const at = right + (j + r) * c.width + d;
      vf row = load(at);
      if constexpr (corrected) with_a[r] = fma(load(a + d), row, with_a[r]);
      if constexpr (decayed) row *= load(decay + d);
      if constexpr (decayed) store(at, row);
      with_q[r] = fma(q_d, row, with_q[r]);
    }
    if constexpr (own) with_q[R] = fma(q_d, load(right + i * c.width + d), with_q[R]);
  }
  float* const to = c.parts + (i * kChunk + j) / 4 * W;
  store(to, sum4(with_q[0], with_q[1], with_q[2], with_q[3]));
  if constexpr (corrected) store(to + kChunk * kChunk / 4 * W, sum4(with_a[0], with_a[1], with_a[2], with_a[3]));
}

// A matrix from its parts, [kChunk, kChunk / 4, W]: zeros above.
inline void add_lanes(float* to, const float* parts, int64_t tokens, float scale) {
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < kChunk; j += W) {
      vf part[W / 4];
      for (int n = 0; n < W / 4; ++n) part[n] = j + 4 * n <= i ? load(parts + (i * kChunk + j) / 4 * W + n * W) : vf{};
      store(to + i * kChunk + j, scale * sum_parts(part));
    }
  }
}

// The products of the rows of Q and A with those of `given`, K or B; and these, decayed up to the end of the chunk, to
// `right`. with_a is not written without a correction.
template <bool corrected, bool decayed>
void multiply_tokens(const DeltaRule& s, const Chunk& c, const float* given, float* right, float* with_q,
                     float* with_a) {
  std::copy_n(given, c.tokens * c.width, right);
  for (int64_t i = 0; i < c.tokens; ++i) {
    int64_t j = 0;
    for (; j + 4 <= i; j += 4) multiply_token<corrected, decayed, 4, false>(c, right, i, j);
    switch (i - j) {
      case 0: multiply_token<corrected, decayed, 0, true>(c, right, i, j); break;
      case 1: multiply_token<corrected, decayed, 1, true>(c, right, i, j); break;
      case 2: multiply_token<corrected, decayed, 2, true>(c, right, i, j); break;
      default: multiply_token<corrected, decayed, 3, true>(c, right, i, j);
    }
  }
  add_lanes(with_q, c.parts, c.tokens, s.scale);
  if constexpr (corrected) add_lanes(with_a, c.parts + kChunk * kChunk / 4 * W, c.tokens, 1.f);
}

template <bool corrected, bool decayed> void prepare_chunk(const DeltaRule& s, const Chunk& c) {
  decay_from_start<corrected, decayed>(s, c);
  multiply_tokens<corrected, decayed>(s, c, c.k, c.k_out, c.Aqk, c.Aak);
  if constexpr (corrected) multiply_tokens<corrected, decayed>(s, c, c.b, c.b_out, c.Aqb, c.Aab);
}

// x = M x, or M^T x, for all columns of x: (I - Aab) is solved for, M itself is not needed.
template <bool transposed, int C> void solve_columns(const Chunk& c, float* x, int64_t width) {
  const auto token = [&](int64_t n) { return transposed ? c.tokens - 1 - n : n; };
  for (int64_t n = 1; n < c.tokens; ++n) {
    const int64_t i = token(n);
    vf sum[1][C];
    load_tile(sum, x + i * width, 0);
    for (int64_t m = 0; m < n; ++m) {
      const int64_t j = token(m);
      multiply_one(sum, 0, 1, c.Aab + (transposed ? j * kChunk + i : i * kChunk + j), 0, x + j * width);
    }
    store_tile(x + i * width, 0, sum);
  }
}
template <bool transposed> void solve(const Chunk& c, float* x, int64_t width) {   // whole vectors
  for_columns<1>(0, width, [&]<int R, int C>(int64_t, int64_t p) { solve_columns<transposed, C>(c, x + p, width); });
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
