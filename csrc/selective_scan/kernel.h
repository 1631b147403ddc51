// Selective scan, the recurrence of Mamba (Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").
//
//   delta[t] = softplus(dt[t] + dt_bias)                             or dt[t] + dt_bias
//   h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
//   y[t] = (<C[t], h[t]> + D u[t]) silu(z[t])                        without z: no gate
//
// per channel d of D, with N states each; channel d reads group d / (D / G) of B and C.
// The gradient, with v the ungated output, g[t] = dL/dh[t] and dv = dy silu(z), walks back in time:
//
//   g[t] = C[t] dv[t] + exp(delta[t+1] A) g[t+1]                     r[t] = exp(delta[t] A) g[t] h[t-1]
//   du = delta <B, g> + D dv     ddelta = u <B, g> + <A, r>          dz = dy v silu'(z)
//   dA = sum_t delta r           dB = sum_d delta u g                dC = sum_d dv h       dstate = exp(delta[0] A) g[0]
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

// Every kChunk tokens, counted from the start of a row and not of a sequence, the forward stores the state it is about to use.
// The backward recomputes one chunk at a time from there.
constexpr int64_t kChunk = 64;
constexpr int64_t kBlock = 128;   // channels that share staged B and C, and whose dB and dC are summed in one go

struct SelectiveScan {
  int64_t batch, time, dim, states, groups;
  View u, dt, z;                // [B, T, D]
  View B, C;                    // [B, T, G, N]
  const float* A;               // [D, N]
  const float *D, *dt_bias;     // [D] or null
  bool dt_softplus;
  const int64_t* cu_seqlens;    // CPU: [S + 1] or null: every row is one sequence
  const int32_t* sequence_of;   // CUDA: [T + 1] as in cuda/packing.h, or null; -1 throughout: all outputs are NaN
  int64_t sequences;            // S, or B
  const float* state;           // [S, D, N] before the first token; null: zeros

  View y;                       // [B, T, D]
  float* state_out;             // [S, D, N] or null
  float* checkpoints;           // [B, checkpoints(T), D, N], on a CPU tile by tile; null: not kept

  View dy;                      // [B, T, D]; null: zeros
  const float* dstate_out;      // [S, D, N]; null: zeros
  View du, ddt, dz;             // [B, T, D]
  View dB, dC;                  // [B, T, G, N], contiguous
  float* dstate;                // [S, D, N] or null
  float *dA, *dD, *dbias;       // [D, N], [D], [D] or null

  // Workspaces. CPU:
  float *dA_rows;               // [B, D, N]: one sum per row, added up by selective_scan_reduce
  float *dD_rows, *dbias_rows;  // [B, D] or null
  float* dBC_blocks;            // [B, G, blocks(s), T, padded(N) / 2, 4]: (dB, dB, dC, dC) of two states, summed over a block
  float* scratch;               // of the thread: forward_scratch(s) or backward_scratch(s) floats, 64-byte aligned
  // CUDA:
  float* workspace;             // selective_scan_forward_workspace(s) or .._backward_workspace(s) floats, 16-byte aligned
};

struct SelectiveScanStep {
  int64_t batch, dim, states, groups;
  View state;                   // [B, D, N], float32 or bfloat16, updated in place
  View u, dt, z, y;             // [B, D]
  View B, C;                    // [B, G, N]
  const float* A;               // [D, N]
  const float *D, *dt_bias;     // [D] or null
  bool dt_softplus;
};

constexpr int64_t checkpoints(int64_t time) { return time > 0 ? (time - 1) / kChunk : 0; }   // before token kChunk, ...
constexpr int64_t padded(int64_t states) { return (states + 7) / 8 * 8; }
inline int64_t blocks(const SelectiveScan& s) { return (s.dim / s.groups + kBlock - 1) / kBlock; }
inline int64_t forward_scratch(const SelectiveScan& s) { return (2 * kBlock + 2 * kChunk) * padded(s.states) + 16; }
inline int64_t backward_scratch(const SelectiveScan& s) { return (3 * kBlock + 4 * kChunk + 16) * padded(s.states) + 16; }

// Work units: forward and step B times tiles(D, G), where a tile is one register's worth of channels of one group; backward
// B G blocks(s); then selective_scan_reduce_tokens B T, for dB and dC, and selective_scan_reduce_channels D, for the rest.
namespace v2 {
int64_t selective_scan_tiles(int64_t dim, int64_t groups);
void selective_scan_forward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_backward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_tokens(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_channels(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_step(const SelectiveScanStep&, int64_t begin, int64_t end);
}
namespace v3 {
int64_t selective_scan_tiles(int64_t dim, int64_t groups);
void selective_scan_forward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_backward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_tokens(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_channels(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_step(const SelectiveScanStep&, int64_t begin, int64_t end);
}
namespace v4 {
int64_t selective_scan_tiles(int64_t dim, int64_t groups);
void selective_scan_forward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_backward(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_tokens(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_reduce_channels(const SelectiveScan&, int64_t begin, int64_t end);
void selective_scan_step(const SelectiveScanStep&, int64_t begin, int64_t end);
}

// CUDA: each launch returns a cudaError_t. The sizes are functions of the shape.
int64_t selective_scan_forward_workspace(const SelectiveScan&);
int64_t selective_scan_backward_workspace(const SelectiveScan&);
int selective_scan_forward_cuda(const SelectiveScan&, void* stream);
int selective_scan_backward_cuda(const SelectiveScan&, void* stream);
int selective_scan_step_cuda(const SelectiveScanStep&, void* stream);

}  // namespace pyseq
