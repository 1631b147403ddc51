// The forward token by token, in the arithmetic of the step. A panel of S stays in the first-level cache while a block
// of tokens passes; one pass over it updates S for a token, multiplies it by q, and by the k of the next token.
#pragma once
#include "gated_delta_rule/unit.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kBlock = 32;   // tokens; divides kGatedDeltaKeep

struct Block {
  int64_t width;       // of a row: whole vectors of K
  float *S, *rows;     // panels; [kBlock, 5, width]
  float beta[kBlock];

  static int64_t size(const GatedDeltaRule& s) {
    return state_size(s.keys, s.values) + kBlock * 5 * whole_vectors(s.keys);
  }
  explicit Block(const GatedDeltaRule& s) : width(whole_vectors(s.keys)) {
    S = s.scratch;
    rows = S + state_size(s.keys, s.values);
  }
  Token token(int64_t t) const {
    float* const row = rows + t * 5 * width;
    return {row, row + width, row + 2 * width, row + 3 * width, reinterpret_cast<int32_t*>(row + 4 * width)};
  }
};

// One panel, `tokens` tokens from `begin`.
template <Gate gate>
void scan(const GatedDeltaRule& s, const Sequence& q, const Block& b, int64_t head, int64_t begin, int64_t tokens,
          int64_t panel) {
  float* const S = b.S + panel * padded_keys(s.keys) * kPanel;
  const int64_t column = panel * kPanel;
  vf u[kPanelVectors], y[kPanelVectors], d[kPanelVectors];
  read(d, S, kPanel, b.token(0).decayed_k, s.keys, kPanel);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t v_at = row_at(s.v, q, begin + t, head), y_at = row_at(s.y, q, begin + t, head);
    for (int n = 0; n < kPanelVectors; ++n) {
      const int64_t at = column + n * W;
      u[n] = at < s.values ? correction(b.beta[t], load(s.v, v_at + at, s.values - at), d[n]) : vf{};
    }
    if (t + 1 < tokens) {
      advance<kPanelVectors, gate, true>(S, kPanel, b.token(t), b.token(t + 1).decayed_k, u, y, d, s.keys, kPanel);
    } else {
      advance<kPanelVectors, gate, false>(S, kPanel, b.token(t), nullptr, u, y, d, s.keys, kPanel);
    }
    for (int n = 0; n < kPanelVectors && column + n * W < s.values; ++n) {
      store(s.y, y_at + column + n * W, y[n] * s.scale, s.values - column - n * W);
    }
  }
}

template <Gate gate> void forward_sequentially(const GatedDeltaRule& s, int64_t unit) {
  Block b(s);
  const Sequence q = sequence_at(s, unit / s.value_heads);
  const int64_t head = unit % s.value_heads, shared = head / (s.value_heads / s.heads);
  load_state(b.S, state_of(s, s.state, q.number, head), s.keys, s.values);
  for (int64_t t = q.begin; t < q.end; t += kBlock) {
    const int64_t tokens = std::min(kBlock, q.end - t);
    keep(s, q, t, head, b.S);
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t g = gate == Gate::one ? number_at(s.g, q, t + i, head) : row_at(s.g, q, t + i, head);
      prepare<gate>(b.token(i), s.k, row_at(s.k, q, t + i, shared), s.q, row_at(s.q, q, t + i, shared), s.g, g, s.keys);
      b.beta[i] = load(s.beta, number_at(s.beta, q, t + i, head), 1)[0];
    }
    for (int64_t p = 0; p < panels(s.values); ++p) scan<gate>(s, q, b, head, t, tokens, p);
  }
  keep(s, q, q.end, head, b.S);
  if (s.state_out) store_state(state_of(s, s.state_out, q.number, head), b.S, s.keys, s.values);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
