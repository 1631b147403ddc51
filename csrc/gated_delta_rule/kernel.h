// The gated delta rule (Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks"), with DeltaNet (Yang et al., 2024) as
// the case without a decay and Kimi Delta Attention (Kimi Team, 2025) as that with one decay per key channel.
//
//   R[t] = diag(exp(g[t])) S[t-1]                                        S: [K, V]; g <= 0
//   u[t] = beta[t] (v[t] - R[t]^T k[t])
//   S[t] = R[t] + k[t] u[t]^T
//   y[t] = scale S[t]^T q[t]
//
// per value head; value head h reads q and k of head h / (HV / H). g is one number per value head, K of them, or absent
// (0). It is the delta rule of csrc/delta_rule with a = -beta exp(g) k and b = k, neither of which is ever in memory.
// In chunks of C tokens: gi[i] the sum of g up to token i of the chunk, gl that of all, S the state before the chunk,
// rows of Q, K, V its tokens:
//
//   Aqk[i, j] = scale sum_d q[i,d] k[j,d] exp(gi[i,d] - gi[j,d]), j <= i
//   N[i, j]   = beta[i] sum_d k[i,d] k[j,d] exp(gi[i,d] - gi[j,d]), j < i
//   U = (I + N)^-1 (beta (V - (K exp(gi)) S))                            row i of U is u[i]
//   Y = scale (Q exp(gi)) S + Aqk U
//   S' = exp(gl) S + (K exp(gl - gi))^T U
//
// exp(x - y) is the product of the decays between, at most 1: nothing is divided by a decay, so any gate is fine.
// The gradient, with G the gradient of the state after token t:
//
//   dq[t] = scale S[t] dy[t]       G = G + scale q[t] dy[t]^T       du = G^T k[t]       dv[t] = beta[t] du
//   dbeta[t] = <du, v[t] - R[t]^T k[t]>       dk[t] = G u[t] - beta[t] R[t] du
//   G = G - beta[t] k[t] du^T      dg[t] = rowsum(G o R[t])         G = diag(exp(g[t])) G
//
// dq and dk are sums over the value heads that share them.
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

enum class GatedDeltaForm : int64_t { by_shape, sequential, chunks };

struct GatedDeltaRule {
  int64_t batch, time, heads, value_heads, keys, values;   // B, T, H, HV, K, V; K and V from 1 to 256; H divides HV
  View q, k;                    // [B, T, H, K]
  View g;                       // [B, T, HV, K]; one_decay: [B, T, HV]; null: no decay
  bool one_decay;
  View beta;                    // [B, T, HV]
  View v;                       // [B, T, HV, V]
  float scale;
  const int64_t* cu_seqlens;    // [S + 1] or null: every row is one sequence. CUDA: where sequence_of says it is valid
  const int32_t* sequence_of;   // CUDA: [T + 1] as in cuda/packing.h, or null; -1 throughout: all outputs are NaN
  int64_t sequences;            // S, or B
  const float* state;           // [S, HV, K, V] before the first token; null: zeros
  GatedDeltaForm form;          // sequential: token by token, in the arithmetic of the step

  View y;                       // [B, T, HV, V]
  float* state_out;             // [S, HV, K, V] or null
  float* kept;                  // [slots, HV, K, V]: S before every kGatedDeltaKeep tokens of a sequence; null: not kept

  View dy;                      // [B, T, HV, V]; null: zeros
  const float* dstate_out;      // [S, HV, K, V]; null: zeros
  View dq, dk, dv, dbeta;       // like q, k, v, beta
  View dg;                      // like g; null without
  float* dstate;                // [S, HV, K, V] or null

  float* scratch;               // CPU: of the thread, gated_delta_rule_*_scratch(s) floats, 64-byte aligned
  float* workspace;             // CUDA: of the call, gated_delta_rule_*_workspace(s) floats, 64-byte aligned
};
// A token with g > 0, unseen by Python, or NaN: its state and all after it in that head and sequence are NaN.

struct GatedDeltaRuleStep {
  int64_t batch, heads, value_heads, keys, values;
  View state;                   // [B, HV, K, V], float32 or bfloat16, updated in place
  View q, k;                    // [B, H, K]
  View g;                       // [B, HV, K]; one_decay: [B, HV]; null: no decay
  bool one_decay;
  View beta;                    // [B, HV]
  View v, y;                    // [B, HV, V]
  float scale;
};

constexpr int64_t kGatedDeltaKeep = 64;   // tokens between two kept states

// Sequence i keeps the states before its tokens 0, 64, 128, ... in slots gated_delta_slot(s, i) and on, fewer than
// gated_delta_slots(s) in all; of a packed sequence they begin at its first token's number / 64 + i.
constexpr int64_t gated_delta_slots(int64_t batch, int64_t time, int64_t sequences, bool packed) {
  return packed ? time / kGatedDeltaKeep + sequences : batch * ((time + kGatedDeltaKeep - 1) / kGatedDeltaKeep);
}
constexpr int64_t gated_delta_slot(int64_t time, const int64_t* cu_seqlens, int64_t i) {
  return cu_seqlens ? cu_seqlens[i] / kGatedDeltaKeep + i : i * ((time + kGatedDeltaKeep - 1) / kGatedDeltaKeep);
}

// Work units: sequences times heads H, or parts of them as the kernel likes; any of them may run at any time.
namespace v2 {
int64_t gated_delta_rule_forward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule&);
void gated_delta_rule_forward(const GatedDeltaRule&, int64_t begin, int64_t end);
int64_t gated_delta_rule_backward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_backward_scratch(const GatedDeltaRule&);
void gated_delta_rule_backward(const GatedDeltaRule&, int64_t begin, int64_t end);
void gated_delta_rule_step(const GatedDeltaRuleStep&, int64_t begin, int64_t end);   // units: B HV
}
namespace v3 {
int64_t gated_delta_rule_forward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule&);
void gated_delta_rule_forward(const GatedDeltaRule&, int64_t begin, int64_t end);
int64_t gated_delta_rule_backward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_backward_scratch(const GatedDeltaRule&);
void gated_delta_rule_backward(const GatedDeltaRule&, int64_t begin, int64_t end);
void gated_delta_rule_step(const GatedDeltaRuleStep&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t gated_delta_rule_forward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule&);
void gated_delta_rule_forward(const GatedDeltaRule&, int64_t begin, int64_t end);
int64_t gated_delta_rule_backward_units(const GatedDeltaRule&);
int64_t gated_delta_rule_backward_scratch(const GatedDeltaRule&);
void gated_delta_rule_backward(const GatedDeltaRule&, int64_t begin, int64_t end);
void gated_delta_rule_step(const GatedDeltaRuleStep&, int64_t begin, int64_t end);
}

// CUDA: each launch returns a cudaError_t. The sizes are functions of the shape.
int64_t gated_delta_rule_forward_workspace(const GatedDeltaRule&);
int64_t gated_delta_rule_backward_workspace(const GatedDeltaRule&);
int gated_delta_rule_forward_cuda(const GatedDeltaRule&, void* stream);
int gated_delta_rule_backward_cuda(const GatedDeltaRule&, void* stream);
int gated_delta_rule_step_cuda(const GatedDeltaRuleStep&, void* stream);

}  // namespace pyseq
