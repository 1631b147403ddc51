// One token of a Mamba layer, all between its two large projections (Gu and Dao, 2023, "Mamba: Linear-Time Sequence
// Modeling with Selective State Spaces"; normed: Zuo et al., 2024, "Falcon Mamba").
//
//   u = silu(conv_bias + sum over k of conv_weight[k] s[k])     s: the samples of conv_state, and x; then s moves on
//   [low, B, C] = W_x u                                         normed: each divided by sqrt(mean(v^2) + eps)
//   delta = softplus(W_dt low + dt_bias)
//   h = exp(delta A) h + delta B u
//   y = (<C, h> + D u) silu(z)
//
// with D channels, N states, a step of rank R and a convolution of width W. W_x is read once for several rows of the
// batch, weights in the dtype they have.
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

struct MambaStep {
  int64_t batch, dim, states, rank, width;
  bool normed;
  float eps;
  View conv_state;              // [B, D, W-1], oldest first; float32 or bfloat16, updated in place
  View state;                   // [B, D, N]; the same
  View x, z, y;                 // [B, D]
  View conv_weight, conv_bias;  // [D, W], [D]; conv_bias may be absent
  View x_proj, dt_proj;         // W_x [R + 2 N, D], W_dt [D, R]
  View dt_bias, A, skip;        // [D], [D, N], [D]: D of the equation

  float* u;                     // CPU: [B, D]
  float* projected;             // CPU: [B, R + 2 N]; CUDA: [chunks(s), B, R + 2 N], to be added up

  constexpr int64_t outputs() const { return rank + 2 * states; }
};

// CUDA: channels whose products one block of the first launch adds up.
constexpr int64_t kMambaChunk = 1024;
constexpr int64_t kMambaWidest = 6080;   // of R + 2 N: four padded rows of it are in 96 KB of shared memory
constexpr int64_t mamba_chunks(int64_t dim) { return (dim + kMambaChunk - 1) / kMambaChunk; }

// CPU, in this order. Work units: mamba_step_tiles(D), a tile being one register's worth of channels; groups of four
// outputs, ceil((R + 2 N) / 4); B, and only if normed; ceil(B / 4) mamba_step_tiles(D).
namespace v2 {
int64_t mamba_step_tiles(int64_t dim);
void mamba_step_convolve(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_project(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_normalise(const MambaStep&, int64_t begin, int64_t end);
void mamba_step(const MambaStep&, int64_t begin, int64_t end);
}
namespace v3 {
int64_t mamba_step_tiles(int64_t dim);
void mamba_step_convolve(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_project(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_normalise(const MambaStep&, int64_t begin, int64_t end);
void mamba_step(const MambaStep&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t mamba_step_tiles(int64_t dim);
void mamba_step_convolve(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_project(const MambaStep&, int64_t begin, int64_t end);
void mamba_step_normalise(const MambaStep&, int64_t begin, int64_t end);
void mamba_step(const MambaStep&, int64_t begin, int64_t end);
}

// CUDA, in this order; both return a cudaError_t. No grid may be empty, and R + 2 N is at most kMambaWidest.
int mamba_step_project_cuda(const MambaStep&, void* stream);
int mamba_step_cuda(const MambaStep&, void* stream);

}  // namespace pyseq
