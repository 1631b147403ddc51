// s = x + residual                       (float32; s = x where there is no residual)
// gate first:  v = s silu(z)             y = w v r            norm first:  v = s      y = w v r silu(z)
// r = 1 / sqrt(mean over the group of v^2 + eps)
//   x, z, residual, y: [O, I, D], that is R = O I rows   w: [D]   rstd: [R, D / group]; a row has D / group groups
#pragma once
#include <cstdint>

#include "view.h"

namespace pyseq {

struct RmsNormGated {
  int64_t rows, inner, dim, group;   // inner = I
  float eps;
  bool norm_before_gate;
  View x, z, residual;     // z and residual may be absent
  const float* weight;
  View y;
  float* sum;              // [R, D] s, stored where there is a residual
  float* rstd;             // [R, D / group] r, kept for the backward

  constexpr int64_t offset(const View& v, int64_t row) const {
    return row / inner * v.stride[0] + row % inner * v.stride[1];
  }
};

struct RmsNormGatedBackward {
  int64_t rows, inner, dim, group;   // inner = I
  bool norm_before_gate;
  View dy, s, z;           // s: x, or the float32 sum where there was a residual
  View dsum;               // gradient arriving at the sum that was returned; may be absent
  const float* weight;
  const float* rstd;
  View dx, dz;             // dz may be absent
  View dresidual;          // equal to dx, in the residual's dtype; may be absent
  float* dweight;          // [D]
  float* partial;          // [blocks, D]: the part of dweight that one block of rows gives
  int64_t rows_per_block;  // a function of the shapes alone, so that sums do not depend on the threads

  constexpr int64_t offset(const View& v, int64_t row) const {
    return row / inner * v.stride[0] + row % inner * v.stride[1];
  }
};

// CPU: a range of rows forward; backward a range of row blocks, whose partial sums the binding adds up.
namespace v2 {
void rms_norm_gated(const RmsNormGated&, int64_t begin, int64_t end);
void rms_norm_gated_backward(const RmsNormGatedBackward&, int64_t begin, int64_t end);
}  // namespace v2
namespace v3 {
void rms_norm_gated(const RmsNormGated&, int64_t begin, int64_t end);
void rms_norm_gated_backward(const RmsNormGatedBackward&, int64_t begin, int64_t end);
}  // namespace v3
namespace v4 {
void rms_norm_gated(const RmsNormGated&, int64_t begin, int64_t end);
void rms_norm_gated_backward(const RmsNormGatedBackward&, int64_t begin, int64_t end);
}  // namespace v4

// CUDA: a cudaError_t. Bound by memory: with a gate and 16-bit data 6 bytes an element forward, 10 backward. Groups of
// all rows are numbered in 32 bits: divisions of 64 bits would cost as much as the rest.
constexpr int64_t kRmsNormMostGroups = (int64_t(1) << 32) - 128;
int64_t rms_norm_gated_rows_per_block(int64_t rows, int64_t dim, int64_t group);
int rms_norm_gated_cuda(const RmsNormGated&, void* stream);
int rms_norm_gated_backward_cuda(const RmsNormGatedBackward&, void* stream);

}  // namespace pyseq
