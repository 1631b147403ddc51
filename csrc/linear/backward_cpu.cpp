// The gradients of x and w are products of matrices again, dx = dy w and dw = dy^T x: linear_forward computes them.
#include "linear/pack.h"

namespace pyseq::PYSEQ_ISA {

void linear_backward_bias(const LinearBackwardBias& l, int64_t begin, int64_t end) {
  constexpr int64_t kVectors = kPanel / W;
  alignas(64) float strip[kChunk * kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel, count = std::min(kPanel, l.N - first);
    vf db[kVectors] = {};
    for (int64_t m = 0; m < l.M; m += kChunk) {   // totals of chunks, added in order, lose less
      const int64_t rows = std::min(kChunk, l.M - m);
      pack_strip({l.dy.data, l.dy.type, l.dy.depth, l.dy.row}, false, first, count, kPanel, m, m + rows, strip);
      vf chunk[kVectors] = {};
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < kVectors; ++c) chunk[c] += load(strip + i * kPanel + c * W);
      }
      for (int64_t c = 0; c < kVectors; ++c) db[c] += chunk[c];
    }
    for (int64_t c = 0; c < kVectors && c * W < count; ++c) store(l.db + first + c * W, db[c], count - c * W);
  }
}

}  // namespace pyseq::PYSEQ_ISA
