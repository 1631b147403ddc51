// What the backward works in: the chunks between two kept states, with all that their gradients need.
#pragma once
#include "gated_delta_rule/forward_chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kChunks = kGatedDeltaKeep / kTokens;
constexpr int64_t kTwice = 2 * kTokens;   // rows of pairs: first those of k, then those of q

struct Work {
  int64_t width, panel_count, heads;   // padded_keys, panels, value heads that share a key head
  float* G;                            // gradient of the state behind what is left: [heads, state_size]
  float *dq, *dk;                      // [kGatedDeltaKeep, width], sums over the value heads

  // Of a chunk each.
  float* S[kChunks];                   // the state before it, in panels
  float *U[kChunks], *E[kChunks];      // [panels, kTokens, kPanel]

  // Of the chunk at hand.
  float* x;                            // [kTokens, width]
  float* Z;                            // beta X of a panel, [kTokens, kPanel]: (I + N)^T X = gradient of U
  float* pair;                         // of a panel, [kTwice, kPanel]: -beta X, and dY
  float *pair_t, *Ut;                  // transposed: [kPanel, kTwice], [kPanel, kTokens]
  float* dots;                         // [kTwice, kTokens]: gradients of N / beta, of Aqk
  float *dpair_t, *dafter_t;           // gradients of k exp(gi) and scale q exp(gi), of k exp(gl - gi), transposed
  float *dbefore_k, *dbefore_q, *dafter;   // the same by rows: [kTokens, width]
  float* held;                         // [width, W]: parts of the sums over a row of S o G
  float* dbeta;                        // [kTokens, W]: parts
  float* dg;                           // [kTokens, width]

  Work(const GatedDeltaRule& s, Scratch& from)
      : width(padded_keys(s.keys)), panel_count(panels(s.values)), heads(s.value_heads / s.heads) {
    const int64_t rows = kTokens * width, tokens = panel_count * kTokens * kPanel, state = state_size(s.keys, s.values);
    G = from.take(heads * state);
    dq = from.take(kGatedDeltaKeep * width);
    dk = from.take(kGatedDeltaKeep * width);
    for (int c = 0; c < kChunks; ++c) S[c] = from.take(state), U[c] = from.take(tokens), E[c] = from.take(tokens);
    x = from.take(rows);
    Z = from.take(kTokens * kPanel);
    pair = from.take(kTwice * kPanel);
    pair_t = from.take(kTwice * kPanel);
    Ut = from.take(kTokens * kPanel);
    dots = from.take(kTwice * kTokens);
    dpair_t = from.take(2 * rows);
    dafter_t = from.take(rows);
    dbefore_k = from.take(rows);
    dbefore_q = from.take(rows);
    dafter = from.take(rows);
    held = from.take(width * W);
    dbeta = from.take(kTokens * W);
    dg = from.take(rows);
  }
};

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
