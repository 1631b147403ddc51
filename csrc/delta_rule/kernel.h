// The generalised delta rule, the recurrence of RWKV-7 (Peng et al., 2025, "RWKV-7 Goose"), with linear attention,
// RetNet (Sun et al., 2023) and GLA (Yang et al., 2024) as the case without a correction.
//
//   p[t] = S[t-1]^T a[t]                                                 reads the state before it decays
//   S[t] = diag(exp(g[t])) S[t-1] + b[t] p[t]^T + k[t] v[t]^T            S: [K, V]; g <= 0
//   y[t] = scale S[t]^T q[t]
//
// per head. Without a and b there is no p; g may be one number per head, or absent (0).
// In chunks of C tokens: gi[i] the sum of g up to token i of the chunk, ge[i] = gi[i] - g[i], gl that of all, S the
// state before the chunk, rows of Q, K, A, B, V its tokens:
//
//   Aqk[i, j] = scale sum_d q[i,d] k[j,d] exp(gi[i,d] - gi[j,d]), j <= i      Aqb: b for k
//   Aak[i, j] =       sum_d a[i,d] k[j,d] exp(ge[i,d] - gi[j,d]), j <  i      Aab: b for k
//   M = (I - Aab)^-1      P = M (Aak V + (A exp(ge)) S)                       row i of P is p[i]
//   Y = scale (Q exp(gi)) S + Aqk V + Aqb P
//   S' = exp(gl) S + (K exp(gl - gi))^T V + (B exp(gl - gi))^T P
//
// exp(x - y) is the product of the decays between, at most 1: nothing is divided by a decay, so any gate is fine.
// The gradient, with G the gradient of the state after token t and dS' that of the last:
//
//   dq[t] = scale S[t] dy[t]                  G = G + scale q[t] dy[t]^T
//   dg[t] = exp(g[t]) rowsum(G o S[t-1])      dk[t] = G v[t]     dv[t] = G^T k[t]     db[t] = G p[t]
//   dp = G^T b[t]     da[t] = S[t-1] dp       G = diag(exp(g[t])) G + a[t] dp^T
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

enum class DeltaForm : int64_t { by_shape, sequential, chunks };

struct DeltaRule {
  int64_t batch, time, heads, keys, values;   // B, T, H, K, V; K and V from 1 to 256
  View q, k, a, b;              // [B, T, H, K]; a and b null: no correction
  View g;                       // [B, T, H, K]; one_decay: [B, T, H]; null: no decay
  bool one_decay;
  View v;                       // [B, T, H, V]
  float scale;
  const int64_t* cu_seqlens;    // [S + 1] or null: every row is one sequence. CUDA: where sequence_of says it is valid
  const int32_t* sequence_of;   // CUDA: [T + 1] as in cuda/packing.h, or null; -1 throughout: all outputs are NaN
  int64_t sequences;            // S, or B
  const float* state;           // [S, H, K, V] before the first token; null: zeros
  DeltaForm form;               // sequential: token by token, in the arithmetic of the step

  View y;                       // [B, T, H, V]
  float* state_out;             // [S, H, K, V] or null
  float* kept;                  // [slots, H, K, V]: S before every kDeltaKeep tokens of each sequence; null: not kept

  View dy;                      // [B, T, H, V]; null: zeros
  const float* dstate_out;      // [S, H, K, V]; null: zeros
  View dq, dk, da, db, dv;      // like q, k, a, b, v; da and db null without a correction
  View dg;                      // like g; null without
  float* dstate;                // [S, H, K, V] or null

  float* scratch;               // CPU: of the thread, delta_rule_*_scratch(s) floats, 64-byte aligned
  float* workspace;             // CUDA: of the call, delta_rule_*_workspace(s) floats, 64-byte aligned
};
// A token with g > 0, unseen by Python, or NaN: its state and all after it in that head and sequence are NaN.

struct DeltaRuleStep {
  int64_t batch, heads, keys, values;
  View state;                   // [B, H, K, V], float32 or bfloat16, updated in place
  View q, k, a, b;              // [B, H, K]; a and b null: no correction
  View g;                       // [B, H, K]; one_decay: [B, H]; null: no decay
  bool one_decay;
  View v, y;                    // [B, H, V]
  float scale;
};

constexpr int64_t kDeltaKeep = 64;   // tokens between two kept states

// Sequence i keeps the states before its tokens 0, 64, 128, ... in slots delta_slot(s, i) and on, fewer than
// delta_slots(s) in all; of a packed sequence they begin at its first token's number / 64 + i.
constexpr int64_t delta_slots(int64_t batch, int64_t time, int64_t sequences, bool packed) {
  return packed ? time / kDeltaKeep + sequences : batch * ((time + kDeltaKeep - 1) / kDeltaKeep);
}
constexpr int64_t delta_slot(int64_t time, const int64_t* cu_seqlens, int64_t i) {
  return cu_seqlens ? cu_seqlens[i] / kDeltaKeep + i : i * ((time + kDeltaKeep - 1) / kDeltaKeep);
}

// Work units: sequences times heads, or parts of them as the kernel likes; any of them may run at any time.
namespace v2 {
int64_t delta_rule_forward_units(const DeltaRule&);
int64_t delta_rule_forward_scratch(const DeltaRule&);
void delta_rule_forward(const DeltaRule&, int64_t begin, int64_t end);
int64_t delta_rule_backward_units(const DeltaRule&);
int64_t delta_rule_backward_scratch(const DeltaRule&);
void delta_rule_backward(const DeltaRule&, int64_t begin, int64_t end);
void delta_rule_step(const DeltaRuleStep&, int64_t begin, int64_t end);   // units: B H
}
namespace v3 {
int64_t delta_rule_forward_units(const DeltaRule&);
int64_t delta_rule_forward_scratch(const DeltaRule&);
void delta_rule_forward(const DeltaRule&, int64_t begin, int64_t end);
int64_t delta_rule_backward_units(const DeltaRule&);
int64_t delta_rule_backward_scratch(const DeltaRule&);
void delta_rule_backward(const DeltaRule&, int64_t begin, int64_t end);
void delta_rule_step(const DeltaRuleStep&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t delta_rule_forward_units(const DeltaRule&);
int64_t delta_rule_forward_scratch(const DeltaRule&);
void delta_rule_forward(const DeltaRule&, int64_t begin, int64_t end);
int64_t delta_rule_backward_units(const DeltaRule&);
int64_t delta_rule_backward_scratch(const DeltaRule&);
void delta_rule_backward(const DeltaRule&, int64_t begin, int64_t end);
void delta_rule_step(const DeltaRuleStep&, int64_t begin, int64_t end);
}

// CUDA: each launch returns a cudaError_t. The sizes are functions of the shape.
int64_t delta_rule_forward_workspace(const DeltaRule&);
int64_t delta_rule_backward_workspace(const DeltaRule&);
int delta_rule_forward_cuda(const DeltaRule&, void* stream);
int delta_rule_backward_cuda(const DeltaRule&, void* stream);
int delta_rule_step_cuda(const DeltaRuleStep&, void* stream);

}  // namespace pyseq
