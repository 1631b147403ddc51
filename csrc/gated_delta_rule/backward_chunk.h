// The gradients of a chunk's products with a panel of the state, by panels.
#pragma once
#include "gated_delta_rule/backward_work.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// to[i][j] += sum over n of a[i * row + n * step] w[n][j], for whole tiles of C vectors
template <int C>
inline void add_product(float* to, int64_t rows, int64_t columns, const float* a, int64_t row, int64_t step,
                        const float* w, int64_t n) {
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int64_t j = 0; j < columns; j += C * W) {
      vf sum[kRows][C];
      load_tile(sum, to + i * columns + j, columns);
      multiply(sum, a + i * row, row, step, w + j, columns, n);
      store_tile(to + i * columns + j, columns, sum);
    }
  }
}
constexpr int kAcross = kTokens / W < kPanelVectors ? kTokens / W : kPanelVectors;   // vectors of a row of kTokens

inline void load_dy(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, int64_t head, int64_t column,
                    float* to) {
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t n = 0; n < kPanel; n += W) {
      const bool there = s.dy && t < c.tokens && column + n < s.values;
      const int64_t at = row_at(s.dy, seq, c.begin + t, head) + column + n;
      store(to + t * kPanel + n, there ? load(s.dy, at, s.values - column - n) : vf{});
    }
  }
}

// dU = Aqk^T dY + (K exp(gl - gi)) G, and X of it by backward substitution. Z = beta X is dV too; <X, E> is dbeta.
inline void solve(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, const Work& w, int64_t head,
                  int64_t column, const float* G, const float* E) {
  const float* const dY = w.pair + kTokens * kPanel;
  for (int64_t i = kTokens - kRows; i >= 0; i -= kRows) {
    const int64_t later = i + kRows;
    Tile sum = {};
    multiply(sum, c.k_after + i * c.width, c.width, 1, G, kPanel, s.keys);
    multiply(sum, c.qk + later * kTokens + i, 1, kTokens, dY + later * kPanel, kPanel, kTokens - later);
    multiply_upper(sum, c.qk + i * kTokens + i, 1, kTokens, dY + i * kPanel, kPanel);
    multiply(sum, c.kk + later * kTokens + i, 1, kTokens, w.Z + later * kPanel, kPanel, kTokens - later);
#pragma GCC unroll 8
    for (int r = kRows - 1; r >= 0; --r) {
      vf total = load(w.dbeta + (i + r) * W);
      const int64_t dv_at = row_at(s.dv, seq, c.begin + i + r, head) + column;
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVectors; ++n) {
        const int64_t at = (i + r) * kPanel + n * W, left = s.values - column - n * W;
        const vf z = sum[r][n] * c.beta[i + r];
        total = fma(sum[r][n], load(E + at), total);
        store(w.Z + at, z);
        store(w.pair + at, -z);
        if (i + r < c.tokens && left > 0) store(s.dv, dv_at + n * W, z, left);
#pragma GCC unroll 8
        for (int earlier = 0; earlier < r; ++earlier) {
          sum[earlier][n] = fma(z, c.kk[(i + r) * kTokens + i + earlier], sum[earlier][n]);
        }
      }
      store(w.dbeta + (i + r) * W, total);
    }
  }
}

// G = exp(gl) G + scale (Q exp(gi))^T dY - (K exp(gi))^T beta X; the sums of S o G before are left in `held`.
template <Gate gate> inline void carry_back(const Chunk& c, const Work& w, const float* S, float* G) {
  for (int64_t i = 0; i < c.width; i += kRows) {
    Tile sum;
    load_tile(sum, G + i * kPanel, kPanel);
    if constexpr (gate != Gate::none) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const vf by = splat(c.by[i + r]);
        const vi whole = splat_int(c.whole[i + r]);
        vf total = load(w.held + (i + r) * W);
#pragma GCC unroll 2
        for (int n = 0; n < kPanelVectors; ++n) {
          total = fma(sum[r][n], load(S + (i + r) * kPanel + n * W), total);
          sum[r][n] = decayed(by, whole, sum[r][n]);
        }
        store(w.held + (i + r) * W, total);
      }
    }
    multiply(sum, c.k_before + i, 1, c.width, w.pair, kPanel, kTokens);
    multiply(sum, c.q_before + i, 1, c.width, w.pair + kTokens * kPanel, kPanel, kTokens);
    store_tile(G + i * kPanel, kPanel, sum);
  }
}

// All panels of a chunk: dv, and what finish() turns into the other gradients.
template <Gate gate>
void walk_panels(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, const Work& w, int chunk, int64_t head,
                 float* G) {
  std::fill_n(w.dots, kTwice * kTokens, 0.f);
  std::fill_n(w.dpair_t, w.width * kTwice, 0.f);
  std::fill_n(w.dafter_t, w.width * kTokens, 0.f);
  std::fill_n(w.held, w.width * W, 0.f);
  std::fill_n(w.dbeta, kTokens * W, 0.f);
  for (int64_t p = 0; p < w.panel_count; ++p) {
    const float* const U = w.U[chunk] + p * kTokens * kPanel;
    const float* const S = w.S[chunk] + p * w.width * kPanel;
    float* const G_p = G + p * w.width * kPanel;
    load_dy(s, seq, c, head, p * kPanel, w.pair + kTokens * kPanel);
    solve(s, seq, c, w, head, p * kPanel, G_p, w.E[chunk] + p * kTokens * kPanel);
    transpose_rows(w.Ut, kTokens, U, kPanel, kTokens, kPanel);
    transpose_rows(w.pair_t, kTwice, w.pair, kPanel, kTwice, kPanel);
    add_product<kAcross>(w.dots, kTwice, kTokens, w.pair, kPanel, 1, w.Ut, kPanel);
    add_product<kAcross>(w.dafter_t, w.width, kTokens, G_p, kPanel, 1, w.Ut, kPanel);
    carry_back<gate>(c, w, S, G_p);
    add_product<kPanelVectors>(w.dpair_t, w.width, kTwice, S, kPanel, 1, w.pair_t, kPanel);
  }
  transpose_rows(w.dbefore_k, w.width, w.dpair_t, kTwice, w.width, kTokens);
  transpose_rows(w.dbefore_q, w.width, w.dpair_t + kTokens, kTwice, w.width, kTokens);
  transpose_rows(w.dafter, w.width, w.dafter_t, kTokens, w.width, kTokens);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
