// The gradient of a chunk, all but what lies between its own tokens: products with the state before it, S, and with G,
// the gradient of the state after it. dY arrives times the scale.
//
//   dR = M^T (Aqb^T dY + (B exp(gl - gi)) G)                           R = Aak V + (A exp(ge)) S, P = M R
//   dV = Aqk^T dY + Aak^T dR + (K exp(gl - gi)) G
//   dAqk = dY V^T   dAqb = dY P^T   dAak = dR V^T   dAab = dR P^T      on and below the diagonal; the last two below it
//   of q: dY S^T    of a: dR S^T    of k: V G^T    of b: P G^T         through the states; decayed in backward_keys.h
//   G before the chunk = exp(gl) G + (Q exp(gi))^T dY + (A exp(ge))^T dR
#pragma once
#include "delta_rule/backward_chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kFetched = 6;   // rows of a token to fetch with a tile

struct Gradients {
  int64_t across;         // tokens side by side: 32 with a correction (those of y and of R; of v and of p), 16 without
  float* dy;              // [16, V], and behind it
  float* dr;              // [16, V]
  float *dyt, *vt;        // [V, across]: dY and dR, V and P, transposed
  float *scores_y, *scores_r;       // [16, across]: dAqk and dAqb, dAak and dAab
  float* through;         // [K, across], to be transposed
  float *through_s, *through_g;     // [across, K]: of q and a, of k and b
  float* dots;            // [K]: rowsum(S o G)
  float* G;               // [K, V]
  float* dv;              // [16, V]

  Gradients(const Sizes& z, Scratch& m) : across((z.corrected ? 2 : 1) * kTokens) {
    dy = m.take(across * z.value_width);
    dr = z.corrected && dy ? dy + kTokens * z.value_width : nullptr;
    for (float** x : {&dyt, &vt}) *x = m.take(z.values * across);
    scores_y = m.take(kTokens * across);
    scores_r = z.corrected ? m.take(kTokens * across) : nullptr;
    through = m.take(z.keys * across);
    for (float** x : {&through_s, &through_g}) *x = m.take(across * z.key_width);
    dots = m.take(z.key_width);
    G = m.take(z.keys * z.value_width);
    dv = m.take(kTokens * z.value_width);
  }
};

// sum += what rows i ... i + R of X^T w are, X a matrix of scores that is 0 above its diagonal.
template <int R, int C>
[[gnu::always_inline]] inline void multiply_scores(vf (&sum)[R][C], const float* scores, const Sizes& z, int64_t i,
                                                   const float* w) {
  const int64_t step = z.scores, row = kTokens * step, width = z.value_width;
  multiply_upper(sum, scores + i * row + i * step, row, step, w + i * width, width);
  multiply(sum, scores + i * row + (i + R) * step, row, step, w + (i + R) * width, width, kTokens - i - R);
}

// The same where the diagonal is 0 too, and w's rows i ... i + R may be those of sum itself.
template <bool solve, int R, int C>
[[gnu::always_inline]] inline void multiply_strictly(vf (&sum)[R][C], const float* scores, const Sizes& z, int64_t i,
                                                     const float* w) {
  const int64_t step = z.scores, row = kTokens * step, width = z.value_width;
  multiply(sum, scores + i * row + (i + R) * step, row, step, w + (i + R) * width, width, kTokens - i - R);
  const float* const near = scores + i * row + i * step;
#pragma GCC unroll 6
  for (int k = R - 1; k > 0; --k) {
    if constexpr (!solve) {
      multiply_one(sum, 0, k, near + k * step, row, w + (i + k) * width);
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < k; ++r) {
        const vf score = splat(near[r * row + k * step]);
#pragma GCC unroll 4
        for (int n = 0; n < C; ++n) sum[r][n] = fma(score, sum[k][n], sum[r][n]);
      }
    }
  }
}

inline void gradient_of_corrections(const Sizes& z, const Chunk& c, const Gradients& w, Ahead& ahead) {
  const int64_t width = z.value_width;
  const auto tile = [&]<int R, int C>(int64_t i, int64_t e) {
    ahead.fetch(kFetched);
    vf sum[R][C] = {};
    multiply(sum, c.b_out + i * z.key_width, z.key_width, 1, w.G + e, width, z.keys);
    multiply_scores(sum, c.scores + qb, z, i, w.dy + e);
    multiply_strictly<true>(sum, c.scores + ab, z, i, w.dr + e);
    store_tile(w.dr + i * width + e, width, sum);
  };
  static_assert(kTokens == 16);
  for_columns<4>(12, width, tile);   // from the last token
  for_columns<6>(6, width, tile);
  for_columns<6>(0, width, tile);
}

inline void gradient_of_values(const Sizes& z, const Chunk& c, const Gradients& w, Ahead& ahead) {
  const int64_t width = z.value_width;
  for_tiles(kTokens, width, [&]<int R, int C>(int64_t i, int64_t e) {
    ahead.fetch(kFetched);
    vf sum[R][C] = {};
    multiply(sum, c.k_out + i * z.key_width, z.key_width, 1, w.G + e, width, z.keys);
    multiply_scores(sum, c.scores + qk, z, i, w.dy + e);
    if (z.corrected) multiply_strictly<false>(sum, c.scores + ak, z, i, w.dr + e);
    store_tile(w.dv + i * width + e, width, sum);
  });
}

// to[r][t] = sum over values of left[r][e] right[e][t]
inline void sum_values(const Sizes& z, int64_t rows, const float* left, const float* right, int64_t across, float* to,
                       Ahead& ahead) {
  for_tiles(rows, across, [&]<int R, int C>(int64_t r, int64_t t) {
    ahead.fetch(kFetched);
    vf sum[R][C] = {};
    multiply(sum, left + r * z.value_width, z.value_width, 1, right + t, across, z.values);
    store_tile(to + r * across + t, across, sum);
  });
}

inline void dots_of_states(const Sizes& z, const float* S, const float* G, float* dots) {
  const auto dot = [&](int64_t d) {
    vf sum{};
    for (int64_t e = 0; d < z.keys && e < z.value_width; e += W) {
      sum = fma(load(S + d * z.value_width + e), load(G + d * z.value_width + e), sum);
    }
    return sum;
  };
  for (int64_t d = 0; d < z.key_width; d += W) {
    vf parts[W / 4];
    for (int r = 0; r < W / 4; ++r) {
      const int64_t row = d + 4 * r;
      parts[r] = sum4(dot(row), dot(row + 1), dot(row + 2), dot(row + 3));
    }
    store(dots + d, sum_parts(parts));
  }
}

inline void gradient_of_state(const Sizes& z, const Chunk& c, const Gradients& w, Ahead& ahead) {
  const int64_t width = z.value_width;
  for_tiles(z.keys, width, [&]<int R, int C>(int64_t d, int64_t e) {
    ahead.fetch(kFetched);
    vf sum[R][C];
    decay_tile(sum, z, c, w.G + e, d);
    multiply(sum, c.q_in + d, 1, z.key_width, w.dy + e, width, kTokens);
    if (z.corrected) multiply(sum, c.a_in + d, 1, z.key_width, w.dr + e, width, kTokens);
    store_tile(w.G + d * width + e, width, sum);
  });
}

// G of the state after the chunk becomes that of the state before it.
inline void gradient_products(const Sizes& z, const Chunk& c, const Gradients& w, Ahead& ahead) {
  if (z.corrected) gradient_of_corrections(z, c, w, ahead);
  gradient_of_values(z, c, w, ahead);
  transpose_rows(w.dyt, w.across, w.dy, z.value_width, w.across, z.values);
  transpose_rows(w.vt, w.across, c.v, z.value_width, w.across, z.values);
  sum_values(z, kTokens, w.dy, w.vt, w.across, w.scores_y, ahead);
  if (z.corrected) sum_values(z, kTokens, w.dr, w.vt, w.across, w.scores_r, ahead);
  sum_values(z, z.keys, c.state, w.dyt, w.across, w.through, ahead);
  transpose_rows(w.through_s, z.key_width, w.through, w.across, z.keys, w.across);
  sum_values(z, z.keys, w.G, w.vt, w.across, w.through, ahead);
  transpose_rows(w.through_g, z.key_width, w.through, w.across, z.keys, w.across);
  dots_of_states(z, c.state, w.G, w.dots);
  gradient_of_state(z, c, w, ahead);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
