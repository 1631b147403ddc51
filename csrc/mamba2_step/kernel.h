// One token of a Mamba-2 layer, all between its two large projections (Dao and Gu, 2024, "Transformers are SSMs").
//
//   [x, B, C] = silu(conv_bias + sum over k of conv_weight[k] s[k])     s: the samples of conv_state, and xBC; then s moves on
//   delta = clamp(softplus(dt + dt_bias), low, high)
//   S = exp(delta A) S + delta x B^T                                    S: [P, N], per head
//   v = S C + D x
//   y = v silu(z)                                                       without a norm; without z: no gate
//   y = w u / sqrt(mean(u^2) + eps)                                     u = v silu(z), the mean over groups of channels
//   y = w v / sqrt(mean(v^2) + eps) silu(z)                             norm_before_gate
//
// with H heads of P channels, N states, G groups of B and C, and a convolution of width W over H P + 2 G N channels. head h
// reads group h / (H / G) of B and C. A head with A > 0 or NaN becomes NaN.
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

struct Mamba2Step {
  int64_t batch, heads, width, states, groups, taps;   // B, H, P, N, G, W
  float dt_low, dt_high;
  int64_t norm_group;           // channels of a mean; 0: no norm
  bool norm_before_gate;
  float eps;
  View conv_state;              // [B, H P + 2 G N, W-1], oldest first; float32 or bfloat16, updated in place
  View state;                   // [B, H, P, N]; the same
  View xBC;                     // [B, H P + 2 G N]
  View z;                       // [B, H P], or absent
  View dt;                      // [B, H]
  View y;                       // [B, H P], of xBC's dtype
  View conv_weight, conv_bias;  // [H P + 2 G N, W], [H P + 2 G N]; conv_bias may be absent
  View A, dt_bias;              // [H]
  View skip;                    // D: [H], or [H, P] where skip_wide
  bool skip_wide;
  View norm_weight;             // [H P], where there is a norm

  float* convolved;             // CPU: [B, H P + 2 G N]
  float* v;                     // [B, H P], gated where the gate comes first; CUDA: only where there is a norm

  constexpr int64_t dim() const { return heads * width; }
  constexpr int64_t channels() const { return dim() + 2 * groups * states; }
  constexpr bool gates_first() const { return bool(z) && !(norm_group && norm_before_gate); }
};

constexpr float kMamba2Least = -1000.f;   // of delta A: exp of it is 0 in any float
constexpr int64_t kMamba2Most = 11776;    // states: two rows of them and 128 channels are in 96 KB of shared memory

// CPU, in this order. Work units: B times blocks of W channels, mamba2_step_tiles(channels); B H; B.
namespace v2 {
int64_t mamba2_step_tiles(int64_t channels);
void mamba2_step_convolve(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step_finish(const Mamba2Step&, int64_t begin, int64_t end);
}
namespace v3 {
int64_t mamba2_step_tiles(int64_t channels);
void mamba2_step_convolve(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step_finish(const Mamba2Step&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t mamba2_step_tiles(int64_t channels);
void mamba2_step_convolve(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step(const Mamba2Step&, int64_t begin, int64_t end);
void mamba2_step_finish(const Mamba2Step&, int64_t begin, int64_t end);
}

// CUDA, in this order; both return a cudaError_t. The first moves on the samples of x, which one block alone reads, the
// second those of B and C, which all blocks of a group read in the first. N is at most kMamba2Most.
int mamba2_step_cuda(const Mamba2Step&, void* stream);
int mamba2_step_finish_cuda(const Mamba2Step&, void* stream);

}  // namespace pyseq
