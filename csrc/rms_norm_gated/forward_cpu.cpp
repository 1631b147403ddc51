#include "cpu/simd.h"
#include "rms_norm_gated/kernel.h"

namespace pyseq::PYSEQ_ISA {

// Two passes over a group: the first sums v^2 (and stores s where there is a residual), the second reads the same lines
// again from cache. v is recomputed: that costs less than a round trip through a buffer.
void rms_norm_gated(const RmsNormGated& a, int64_t begin, int64_t end) {
  const int64_t groups = a.dim / a.group;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t x = a.offset(a.x, row), z = a.offset(a.z, row);
    const int64_t residual = a.offset(a.residual, row), y = a.offset(a.y, row);
    float* sum_row = a.sum ? a.sum + row * a.dim : nullptr;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * a.group, last = first + a.group;
      vf squares = {};
      for (int64_t d = first; d < last; d += W) {
        const int64_t n = last - d;
        vf v = load(a.x, x + d, n);
        if (sum_row) {
          v += load(a.residual, residual + d, n);
          store(sum_row + d, v, n);
        }
        if (a.z && !a.norm_before_gate) v *= silu(load(a.z, z + d, n));
        squares = fma(v, v, squares);
      }
      const float r = 1.f / std::sqrt(sum(squares) / float(a.group) + a.eps);
      a.rstd[row * groups + g] = r;
      for (int64_t d = first; d < last; d += W) {
        const int64_t n = last - d;
        vf v = sum_row ? load(sum_row + d, n) : load(a.x, x + d, n);
        if (a.z) v *= silu(load(a.z, z + d, n));
        store(a.y, y + d, v * r * load(a.weight + d, n), n);
      }
    }
  }
}

}  // namespace pyseq::PYSEQ_ISA
