// What the forward pass makes of a chunk: the scores between its tokens, P, and the state after it (kernel.h).
#pragma once
#include "delta_rule/backward_rows.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// sums[i][m], the scores of token j with the tokens i behind it, of C vectors of keys from d; added to what is there
// unless it is the first part.
template <bool corrected, int C>
[[gnu::always_inline]] inline void add_scores(const Sizes& z, const Chunk& c, int64_t j, int64_t d, vf (*sums)[4]) {
  vf k[C], b[C];
#pragma GCC unroll 4
  for (int n = 0; n < C; ++n) {
    k[n] = load(c.k + j * z.key_width + d + n * W);
    if constexpr (corrected) b[n] = load(c.b + j * z.key_width + d + n * W);
  }
  for (int64_t i = j; i < kTokens; ++i) {
    const int64_t row = i * z.key_width + d;
    vf sum[4] = {};
    if (d > 0) std::copy_n(sums[i], 4, sum);
    if (i > j) {
#pragma GCC unroll 4
      for (int n = 0; n < C; ++n) {
        const vf decay = load(c.decay + row + n * W);
        if constexpr (corrected) {
          const vf a = load(c.a + row + n * W);
          sum[ak] = fma(a, k[n], sum[ak]);
          sum[ab] = fma(a, b[n], sum[ab]);
          b[n] *= decay;
        }
        k[n] *= decay;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      const vf q = load(c.q + row + n * W);
      sum[qk] = fma(q, k[n], sum[qk]);
      if constexpr (corrected) sum[qb] = fma(q, b[n], sum[qb]);
    }
    std::copy_n(sum, 4, sums[i]);
  }
}

// The rows of scores that begin in the whole vector of j; those before j are whatever `sums` held, and not used.
template <bool corrected> void score_tokens(const Sizes& z, const Chunk& c) {
  vf sums[kTokens][4] = {};
  for (int64_t j = 0; j < kTokens; ++j) {
    int64_t d = 0;
    for (; d + 3 * W < z.key_width; d += 4 * W) add_scores<corrected, 4>(z, c, j, d, sums);
    for (; d < z.key_width; d += W) add_scores<corrected, 1>(z, c, j, d, sums);
    float* const to = c.scores + j * kTokens * z.scores;
    constexpr int kAtOnce = corrected ? W / 4 : W;   // tokens to a vector of scores
    for (int64_t i = j / kAtOnce * kAtOnce; i < kTokens; i += kAtOnce) {
      vf parts[W / 4];
#pragma GCC unroll 4
      for (int r = 0; r < W / 4; ++r) {
        const vf(*const x)[4] = sums + i + (corrected ? r : 4 * r);
        parts[r] = corrected ? sum4(x[0][qk], x[0][qb], x[0][ak], x[0][ab]) : sum4(x[0][qk], x[1][qk], x[2][qk], x[3][qk]);
      }
      store(to + i * z.scores, sum_parts(parts));
    }
  }
}

// P = Aak V + (A exp(ge)) S + Aab P, a few rows at a time from the first.
inline void correct(const Sizes& z, const Chunk& c) {
  const int64_t row = z.scores, step = kTokens * row, width = z.value_width;
  for_tiles(kTokens, width, [&]<int R, int C>(int64_t i, int64_t e) {
    vf sum[R][C] = {};
    multiply(sum, c.a_in + i * z.key_width, z.key_width, 1, c.state + e, width, z.keys);
    multiply(sum, c.scores + i * row + ak, row, step, c.v + e, width, i);
    multiply(sum, c.scores + i * row + ab, row, step, c.p + e, width, i);
    const float* const near = c.scores + i * row + i * step;
#pragma GCC unroll 6
    for (int j = 0; j + 1 < R; ++j) {
      multiply_one(sum, j + 1, R, near + j * step + ak, row, c.v + (i + j) * width + e);
#pragma GCC unroll 6
      for (int r = j + 1; r < R; ++r) {
        const vf score = splat(near[j * step + r * row + ab]);
#pragma GCC unroll 4
        for (int n = 0; n < C; ++n) sum[r][n] = fma(score, sum[j][n], sum[r][n]);
      }
    }
    store_tile(c.p + i * width + e, width, sum);
  });
}

// sum = exp(gl) times rows d ... d + R of a state
template <int R, int C>
[[gnu::always_inline]] inline void decay_tile(vf (&sum)[R][C], const Sizes& z, const Chunk& c, const float* state,
                                              int64_t d) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const vf whole = splat(c.whole[d + r]);
    const vi kept = splat_int(c.kept[d + r]);
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      const vf v = load(state + (d + r) * z.value_width + n * W);
      sum[r][n] = fma(whole, v, as_float(as_int(v) & kept));
    }
  }
}

// to = exp(gl) S + (K exp(gl - gi))^T V + (B exp(gl - gi))^T P
inline void advance(const Sizes& z, const Chunk& c, float* to) {
  const int64_t width = z.value_width;
  for_tiles(z.keys, width, [&]<int R, int C>(int64_t d, int64_t e) {
    vf sum[R][C];
    decay_tile(sum, z, c, c.state + e, d);
    multiply(sum, c.k_out + d, 1, z.key_width, c.v + e, width, kTokens);
    if (z.corrected) multiply(sum, c.b_out + d, 1, z.key_width, c.p + e, width, kTokens);
    store_tile(to + d * width + e, width, sum);
  });
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
