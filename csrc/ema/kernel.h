// Exponential moving average with a weight of its own for each token, the smoothing of H-Net's dechunking (Hwang, Wang and
// Gu, 2025, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling").
//
//   y[t] = p[t] x[t] + (1 - p[t]) y[t-1]
//
// per channel; p is one number per token. Its gradient, with g[t] = dL/dy[t] from all that follows, walks back in time:
//
//   g[t] = dy[t] + (1 - p[t+1]) g[t+1]
//   dx = p g          dp = sum over channels of g[t] (x[t] - y[t-1])          dstate = (1 - p[0]) g[0]
//
// 1 - p is never rounded: (1 - p) y is y - p y in one fused operation. Rounded, it would multiply the error of a small p by
// 1 / p, the length of the memory. Bound by memory: 4 bytes a sample of 16 bits forward, 6 backward.
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

// Every kEmaChunk tokens, counted from the start of a row and not of a sequence, the forward keeps the y it is about to use,
// in float32: y itself is rounded to x's dtype. The backward computes y again from there, so that it reads x and dy once.
constexpr int64_t kEmaChunk = 16;

struct Ema {
  int64_t batch, time, dim;
  View x, y;                    // [B, T, D] of one dtype
  View p;                       // [B, T]
  const int64_t* cu_seqlens;    // [S + 1] or null: every row is one sequence
  const int32_t* sequence_of;   // CUDA: [T + 1] as in cuda/packing.h, or null; -1 throughout: all outputs are NaN
  int64_t sequences;            // S, or B
  const float* state;           // [S, D], y before the first token; null: zeros
  float* state_out;             // [S, D] or null
  float* kept;                  // [B, ema_chunks(T), D]; null: not kept
};

struct EmaBackward {
  Ema forward;                  // y and state_out are not used
  View dy, dx;                  // [B, T, D] of x's dtype; dy null, on a CPU: zeros
  View dp;                      // CUDA: [B, T], contiguous
  const float* dstate_out;      // [S, D]; null: zeros
  float* dstate;                // [S, D] or null
  float* partial;               // [B, blocks, T]: dp summed over the channels of a block
};

struct EmaStep {
  int64_t batch, dim;
  View state;                   // [B, D], float32 or bfloat16, updated in place
  View x, y;                    // [B, D] of one dtype
  View p;                       // [B], of any stride
};

constexpr int64_t ema_chunks(int64_t time) { return time > 0 ? (time - 1) / kEmaChunk : 0; }   // before token kEmaChunk, ...

// CPU. Units: forward and backward B times blocks of kEmaBlock channels, step B.
constexpr int64_t kEmaBlock = 128;
constexpr int64_t ema_blocks(int64_t dim) { return (dim + kEmaBlock - 1) / kEmaBlock; }
namespace v2 {
void ema_forward(const Ema&, int64_t begin, int64_t end);
void ema_backward(const EmaBackward&, int64_t begin, int64_t end);
void ema_step(const EmaStep&, int64_t begin, int64_t end);
}
namespace v3 {
void ema_forward(const Ema&, int64_t begin, int64_t end);
void ema_backward(const EmaBackward&, int64_t begin, int64_t end);
void ema_step(const EmaStep&, int64_t begin, int64_t end);
}
namespace v4 {
void ema_forward(const Ema&, int64_t begin, int64_t end);
void ema_backward(const EmaBackward&, int64_t begin, int64_t end);
void ema_step(const EmaStep&, int64_t begin, int64_t end);
}

// CUDA: a cudaError_t. A block has kEmaTile channels of a row.
constexpr int64_t kEmaTile = 64;
constexpr int64_t ema_tiles(int64_t dim) { return (dim + kEmaTile - 1) / kEmaTile; }
int ema_forward_cuda(const Ema&, void* stream);
int ema_backward_cuda(const EmaBackward&, void* stream);
int ema_step_cuda(const EmaStep&, void* stream);

}  // namespace pyseq
