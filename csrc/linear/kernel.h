// y[m, n] = bias[n] + sum_k x[m, k] w[n, k]        x: [M, K]   w: [N, K]   bias: [N]   y: [M, N]
//
// A panel is the weight of 32 outputs, k first, in 32-bit words: a float32, or a pair of bfloat16 (even k in the low
// half).   panels: [ceil(N / 32), depth, 32], depth = K for float32 and ceil(K / 2) for pairs, padded with zeros
// Rows of x are packed alike, in tiles of as many rows as a register tile holds.
//
// The sum over k runs in order (in a pair the odd one first, as vdpbf16ps has it), in chunks of 256 words whose totals
// are added in order. So a row of y has the same bits whatever M and the number of threads, and whether w was packed
// before or on the way.
#pragma once
#include "view.h"

namespace pyseq {

constexpr int64_t kPanel = 32;    // outputs
constexpr int64_t kChunk = 256;   // words of k

struct Matrix {   // element (i, k) at data + i row + k depth, in elements; row or depth is 1
  void* data = nullptr;
  DType type = DType::f32;
  int64_t row = 0, depth = 0;
};

struct Linear {
  int64_t M = 0, N = 0, K = 0;
  int64_t begin = 0, end = 0;    // the k of this call; begin is a multiple of kChunk words
  Matrix x, w;                   // w.data null: the weight comes as panels
  const float* panels = nullptr;
  bool pairs = false;            // the words of panels, or of w packed on the way, are pairs: w is bfloat16
  bool dot = false;              // so are those of x, and vdpbf16ps multiplies them; otherwise products are float32
  float* rows = nullptr;         // packed x: M (end - begin + 1) floats are enough
  float* total = nullptr;        // [M, N] sums so far, where one call does not cover K; may be y
  View y;
  const float* bias = nullptr;
};

struct PackLinear {   // w -> panels
  int64_t N = 0, K = 0;
  Matrix w;
  float* panels = nullptr;
};

struct LinearBackwardBias {   // db[n] = sum_m dy[m, n]
  int64_t M = 0, N = 0;
  Matrix dy;                  // [M, N]
  float* db = nullptr;
};

namespace v2 {
int64_t linear_tiles(int64_t M);
int64_t linear_blocks(int64_t M);
void linear_pack(const PackLinear&, int64_t begin, int64_t end);   // units: panels
void linear_pack_rows(const Linear&, int64_t begin, int64_t end);   // tiles of rows
void linear_forward(const Linear&, int64_t begin, int64_t end);   // blocks of tiles x panels, panels fastest
void linear_backward_bias(const LinearBackwardBias&, int64_t begin, int64_t end);   // panels of N
}  // namespace v2
namespace v3 {
int64_t linear_tiles(int64_t M);
int64_t linear_blocks(int64_t M);
void linear_pack(const PackLinear&, int64_t begin, int64_t end);
void linear_pack_rows(const Linear&, int64_t begin, int64_t end);
void linear_forward(const Linear&, int64_t begin, int64_t end);
void linear_backward_bias(const LinearBackwardBias&, int64_t begin, int64_t end);
}  // namespace v3
namespace v4 {
int64_t linear_tiles(int64_t M);
int64_t linear_blocks(int64_t M);
void linear_pack(const PackLinear&, int64_t begin, int64_t end);
void linear_pack_rows(const Linear&, int64_t begin, int64_t end);
void linear_forward(const Linear&, int64_t begin, int64_t end);
void linear_backward_bias(const LinearBackwardBias&, int64_t begin, int64_t end);
}  // namespace v4

}  // namespace pyseq
