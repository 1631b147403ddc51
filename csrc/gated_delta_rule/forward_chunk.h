// The forward by chunks: the three products of a chunk with a panel of the state, and the small ones between.
#pragma once
#include "gated_delta_rule/chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// U of a panel, [kTokens, kPanel], by forward substitution: U = beta E, E = V - K exp(gi) S - N / beta U. E: or null.
inline void correct(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, int64_t head, int64_t column,
                    const float* S, float* U, float* E) {
  for (int64_t i = 0; i < kTokens; i += kRows) {
    Tile sum = {};
    multiply(sum, c.k_before + i * c.width, c.width, 1, S, kPanel, s.keys);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int64_t v_at = row_at(s.v, seq, c.begin + i + r, head);
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVectors; ++n) {
        const int64_t at = column + n * W;
        const vf v = i + r < c.tokens && at < s.values ? load(s.v, v_at + at, s.values - at) : vf{};
        sum[r][n] = v - sum[r][n];
      }
    }
    multiply(sum, c.kk + i * kTokens, kTokens, 1, U, kPanel, i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVectors; ++n) {
        const vf u = sum[r][n] * c.beta[i + r];
        if (E) store(E + (i + r) * kPanel + n * W, sum[r][n]);
        store(U + (i + r) * kPanel + n * W, u);
#pragma GCC unroll 8
        for (int later = r + 1; later < kRows; ++later) {
          sum[later][n] = fma(u, c.kk[(i + later) * kTokens + i + r], sum[later][n]);
        }
      }
    }
  }
}

// Y = scale Q exp(gi) S + Aqk U
inline void read_out(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, int64_t head, int64_t column,
                     const float* S, const float* U) {
  for (int64_t i = 0; i < c.tokens; i += kRows) {
    Tile sum = {};
    multiply(sum, c.q_before + i * c.width, c.width, 1, S, kPanel, s.keys);
    multiply(sum, c.qk + i * kTokens, kTokens, 1, U, kPanel, i);
    multiply_lower(sum, c.qk + i * kTokens + i, kTokens, 1, U + i * kPanel, kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int64_t y_at = row_at(s.y, seq, c.begin + i + r, head);
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVectors; ++n) {
        const int64_t at = column + n * W;
        if (i + r < c.tokens && at < s.values) store(s.y, y_at + at, sum[r][n], s.values - at);
      }
    }
  }
}

// to = exp(gl) S + (K exp(gl - gi))^T U
template <Gate gate> inline void carry(const Chunk& c, const float* S, const float* U, float* to) {
  for (int64_t i = 0; i < c.width; i += kRows) {
    Tile sum;
    load_tile(sum, S + i * kPanel, kPanel);
    if constexpr (gate != Gate::none) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const vf by = splat(c.by[i + r]);
        const vi whole = splat_int(c.whole[i + r]);
#pragma GCC unroll 2
        for (int n = 0; n < kPanelVectors; ++n) sum[r][n] = decayed(by, whole, sum[r][n]);
      }
    }
    multiply(sum, c.k_after + i, 1, c.width, U, kPanel, kTokens);
    store_tile(to + i * kPanel, kPanel, sum);
  }
}

inline int64_t forward_chunks_scratch(const GatedDeltaRule& s) {
  Scratch from{nullptr};
  Chunk c(s, from);
  from.take(state_size(s.keys, s.values));
  from.take(kTokens * std::max(c.width, kPanel));
  return from.used;
}

template <Gate gate> void forward_in_chunks(const GatedDeltaRule& s, int64_t unit) {
  Scratch from{s.scratch};
  Chunk c(s, from);
  float* const S = from.take(state_size(s.keys, s.values));
  float* const work = from.take(kTokens * std::max(c.width, kPanel));
  const Sequence q = sequence_at(s, unit / s.value_heads);
  const int64_t head = unit % s.value_heads, shared = head / (s.value_heads / s.heads);
  load_state(S, state_of(s, s.state, q.number, head), s.keys, s.values);
  for (int64_t t = q.begin; t < q.end; t += kTokens) {
    keep(s, q, t, head, S);
    c.begin = t, c.tokens = std::min<int64_t>(kTokens, q.end - t);
    load_chunk<gate>(s, q, c, head);
    prefetch<0>(s.k, q, t + kTokens, shared, s.keys);
    prefetch<0>(s.q, q, t + kTokens, shared, s.keys);
    prefetch<0>(s.v, q, t + kTokens, head, s.values);
    prefetch<1>(s.y, q, t, head, s.values);
    multiply_tokens<gate>(s, c, work);
    for (int64_t p = 0; p < panels(s.values); ++p) {
      float* const panel = S + p * c.width * kPanel;
      correct(s, q, c, head, p * kPanel, panel, work, nullptr);
      read_out(s, q, c, head, p * kPanel, panel, work);
      carry<gate>(c, panel, work, panel);
    }
  }
  keep(s, q, q.end, head, S);
  if (s.state_out) store_state(state_of(s, s.state_out, q.number, head), S, s.keys, s.values);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
