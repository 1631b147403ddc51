// State-space dual, the recurrence of Mamba-2 (Dao and Gu, 2024, "Transformers are SSMs").
//
//   delta[t] = clamp(softplus(dt[t] + dt_bias), low, high)             or without softplus; 0 <= low
//   S[t] = exp(delta[t] A) S[t-1] + delta[t] x[t] B[t]^T               S: [P, N]
//   y[t] = (S[t] C[t] + D x[t]) silu(z[t])                             without z: no gate
//
// per head h; head h reads group h / (H / G) of B and C. In chunks of Q tokens, L[i] the sum of delta A up to token i
// of the chunk and S the state before it:
//
//   y[i] = exp(L[i]) S C[i] + sum_{j <= i} <C[i], B[j]> exp(L[i] - L[j]) delta[j] x[j]
//   S'   = exp(L[Q]) S + sum_j exp(L[Q] - L[j]) delta[j] x[j] B[j]^T
//
// Only differences of L are exponentiated, and only those <= 0. delta A is cut off at kLeast, and L kept in two floats
// or float64: in one float a difference after a large step would lose its digits.
// The gradient, with v the ungated output, dv = dy silu(z), G the gradient of the state after the chunk:
//
//   U[j] = sum_{i >= j} <C[i], B[j]> exp(L[i] - L[j]) dv[i] + exp(L[Q] - L[j]) G B[j]
//   E[i, j] = <dv[i], x[j]> delta[j] exp(L[i] - L[j]), i >= j
//   G before the chunk = exp(L[Q]) G + sum_i exp(L[i]) dv[i] C[i]^T
//   dx[j] = delta[j] U[j] + D dv[j]       dz = dy v silu'(z)           dD = sum_t dv x
//   dC[i] = sum_j E[i, j] B[j] + exp(L[i]) S^T dv[i]
//   dB[j] = sum_i E[i, j] C[i] + exp(L[Q] - L[j]) delta[j] G^T x[j]
//   da[k] = sum_{i >= k} exp(L[i]) <dv[i], S C[i]> + exp(L[Q]) <G, S>
//           + sum_{j < k} exp(L[Q] - L[j]) delta[j] <x[j], G B[j]> + sum_{j < k <= i} E[i, j] <C[i], B[j]>
//   ddelta[k] = <U[k], x[k]> + A da[k]    dA = sum_t delta da
//   ddt = ddelta where low <= delta <= high, times softplus'
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

struct Ssd {
  int64_t batch, time, heads, width, states, groups;   // B, T, H, P, N, G
  View x, z;                    // [B, T, H, P]
  View dt;                      // [B, T, H]
  View B, C;                    // [B, T, G, N]
  const float* A;               // [H]. A head with A > 0 or NaN: all its outputs, states and gradients are NaN,
                                // but what an empty sequence passes through
  const float *D, *dt_bias;     // [H, D_width], [H] or null
  int64_t D_width;              // 1 or P
  bool dt_softplus;
  float dt_low, dt_high;
  const int64_t* cu_seqlens;    // [S + 1] or null: every row is one sequence. CUDA: where sequence_of says it is valid
  const int32_t* sequence_of;   // CUDA: [T + 1] as in cuda/packing.h, or null; -1 throughout: all outputs are NaN
  int64_t sequences;            // S, or B
  const float* state;           // [S, H, P, N] before the first token; null: zeros
  bool exact;                   // token by token, in the arithmetic of the step
  int64_t chunk;                // Q on a CPU, 0: the kernel chooses
  bool dot;                     // CPU: x, B and C are bfloat16, and the machine has products of pairs of them

  View y;                       // [B, T, H, P]
  float* state_out;             // [S, H, P, N] or null

  View dy;                      // [B, T, H, P]; null: zeros
  View ungated;                 // v, [B, T, H, P] float32, where there is z
  const float* dstate_out;      // [S, H, P, N]; null: zeros
  View dx, dz;                  // [B, T, H, P]
  View ddt;                     // [B, T, H]
  View dB, dC;                  // [B, T, G, N]
  float* dstate;                // [S, H, P, N] or null
  float *dA, *dD, *dbias;       // [H], [H, D_width], [H]; the last two or null

  int64_t threads;              // CPU: how many will share the units
  float* scratch;               // CPU: of the thread, ssd_*_scratch(s) floats, 64-byte aligned
  float* workspace;             // of the call: ssd_*_workspace(s) floats, 64-byte aligned
};

struct SsdStep {
  int64_t batch, heads, width, states, groups;
  View state;                   // [B, H, P, N], float32 or bfloat16, updated in place
  View x, z, y;                 // [B, H, P]
  View dt;                      // [B, H]
  View B, C;                    // [B, G, N]
  const float* A;               // [H]
  const float *D, *dt_bias;     // [H, D_width], [H] or null
  int64_t D_width;
  bool dt_softplus;
  float dt_low, dt_high;
};

constexpr float kLeast = -1000.f;   // exp of it is 0 in any float

// Work units. Forward: ssd_forward_units(s), each a sequence and some heads. Backward: ssd_backward_units(s) of the
// same kind, which leave sums over heads and tokens in the workspace; then ssd_reduce_tokens, B T units, and
// ssd_reduce_heads, H units, add them up in a fixed order. Step: B H.
namespace v2 {
int64_t ssd_forward_units(const Ssd&);
int64_t ssd_forward_scratch(const Ssd&);
void ssd_forward(const Ssd&, int64_t begin, int64_t end);
int64_t ssd_backward_units(const Ssd&);
int64_t ssd_backward_scratch(const Ssd&);
int64_t ssd_backward_workspace(const Ssd&);
void ssd_backward(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_tokens(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_heads(const Ssd&, int64_t begin, int64_t end);
void ssd_step(const SsdStep&, int64_t begin, int64_t end);
}
namespace v3 {
int64_t ssd_forward_units(const Ssd&);
int64_t ssd_forward_scratch(const Ssd&);
void ssd_forward(const Ssd&, int64_t begin, int64_t end);
int64_t ssd_backward_units(const Ssd&);
int64_t ssd_backward_scratch(const Ssd&);
int64_t ssd_backward_workspace(const Ssd&);
void ssd_backward(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_tokens(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_heads(const Ssd&, int64_t begin, int64_t end);
void ssd_step(const SsdStep&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t ssd_forward_units(const Ssd&);
int64_t ssd_forward_scratch(const Ssd&);
void ssd_forward(const Ssd&, int64_t begin, int64_t end);
int64_t ssd_backward_units(const Ssd&);
int64_t ssd_backward_scratch(const Ssd&);
int64_t ssd_backward_workspace(const Ssd&);
void ssd_backward(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_tokens(const Ssd&, int64_t begin, int64_t end);
void ssd_reduce_heads(const Ssd&, int64_t begin, int64_t end);
void ssd_step(const SsdStep&, int64_t begin, int64_t end);
}

// CUDA: each launch returns a cudaError_t. The sizes are functions of the shape.
int64_t ssd_forward_workspace(const Ssd&);
int64_t ssd_backward_workspace(const Ssd&);
int ssd_forward_cuda(const Ssd&, void* stream);
int ssd_backward_cuda(const Ssd&, void* stream);
int ssd_step_cuda(const SsdStep&, void* stream);

}  // namespace pyseq
