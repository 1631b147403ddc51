// Causal depthwise convolution along time, the short convolution in front of Mamba's scan (Gu & Dao, 2023).
//
//   a[t] = bias + sum over k of weight[k] x[t - (W-1) + k]          k = 0 .. W-1; the last tap meets the current sample
//   y[t] = a[t], or silu(a[t])
//
// The W-1 samples before a sequence's first are its state, oldest first (zeros without one); the state it leaves is its
// last W-1 samples. Backward, given dy and dnew_state; a is computed again rather than stored:
//
//   e[t] = dy[t], or dy[t] silu'(a[t])        dx[j] = sum over k of weight[k] e[j + (W-1) - k]
//   dweight[k] = sum over t of e[t] x[t - (W-1) + k]        dbias = sum over t of e[t]
//
// dx at the W-1 samples before the first is dstate; dnew_state adds to dx at the last W-1 samples.
#pragma once
#include "view.h"

namespace pyseq {

// CPU: a unit of work is kConvChannels neighbouring channels of a run of rows; the B T tokens are numbered through as
// rows. CUDA: a run is of one batch row, and a thread has up to 16 bytes of channels of it.
constexpr int64_t kConvChannels = 512;
constexpr int64_t kConvRows = 64;

struct CausalConv1d {
  int64_t B, T, D, W;
  int64_t S;                   // sequences: B, or as many as are packed in the one batch row
  const int64_t* cu_seqlens;   // [S + 1] or null
  const int32_t* sequence_of;  // CUDA: [T + 1] where there is cu_seqlens, see cuda/packing.h
  int64_t rows, runs;          // rows in a run; how many runs, on the CPU at least 1
  bool silu;
  View x, y;                   // [B, T, D] of one dtype
  const float* weight;         // CPU: [W, D]; CUDA: [D, W], as it comes
  const float* bias;           // [D] or null
  const float* state;          // [S, D, W-1] or null
  float* new_state;            // [S, D, W-1] or null
};

struct CausalConv1dBackward {
  CausalConv1d forward;        // y and new_state are not used
  View dy, dx;                 // [B, T, D] of x's dtype
  const float* dnew_state;     // [S, D, W-1] or null
  float* dstate;               // [S, D, W-1] or null
  float* e;                    // [B T, D] where no specialised kernel fits (CPU: W > 4), else null
  float* partial;              // [runs, W + 1, D]: the taps of dweight, then dbias, summed over one run
  float* dweight;              // [D, W]
  float* dbias;                // [D] or null
};

struct CausalConv1dStep {
  int64_t B, D, W;
  bool silu;
  View x, y;                   // [B, D] of one dtype
  View state;                  // [B, D, W-1] float32 or bfloat16; shifted by one sample in place
  const float* weight;         // [D, W]
  const float* bias;           // [D] or null
};

// Ranges of units. forward, backward, backward_e, backward_wide: runs x channel blocks, the blocks innermost;
// backward_sum: channel blocks; step: batch rows. W > 4 takes backward_e, then backward_wide, instead of backward;
// backward_sum comes last.
namespace v2 {
void causal_conv1d_forward(const CausalConv1d&, int64_t begin, int64_t end);
void causal_conv1d_backward(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_e(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_wide(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_sum(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_step(const CausalConv1dStep&, int64_t begin, int64_t end);
}  // namespace v2
namespace v3 {
void causal_conv1d_forward(const CausalConv1d&, int64_t begin, int64_t end);
void causal_conv1d_backward(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_e(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_wide(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_sum(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_step(const CausalConv1dStep&, int64_t begin, int64_t end);
}  // namespace v3
namespace v4 {
void causal_conv1d_forward(const CausalConv1d&, int64_t begin, int64_t end);
void causal_conv1d_backward(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_e(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_wide(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_backward_sum(const CausalConv1dBackward&, int64_t begin, int64_t end);
void causal_conv1d_step(const CausalConv1dStep&, int64_t begin, int64_t end);
}  // namespace v4

// CUDA: a cudaError_t. Widths 2 to 4 of whole, aligned vectors of channels keep their window in registers; any other
// case runs a channel a thread through the caches. Both do the same operations in the same order: the same bits.
// Bound by memory: 4 bytes a sample of 16 bits forward, 6 backward.
bool causal_conv1d_backward_is_wide(const CausalConv1dBackward&);   // whether the launcher below reads and writes e
int causal_conv1d_forward_cuda(const CausalConv1d&, void* stream);
int causal_conv1d_backward_cuda(const CausalConv1dBackward&, void* stream);
int causal_conv1d_step_cuda(const CausalConv1dStep&, void* stream);

}  // namespace pyseq
