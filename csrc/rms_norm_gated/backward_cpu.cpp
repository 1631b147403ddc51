#include "cpu/simd.h"
#include "rms_norm_gated/kernel.h"

namespace pyseq::PYSEQ_ISA {

// With x_hat = v r and q = e w, where e is the gradient at w x_hat (dy, times silu(z) where the norm came first):
//   dw = sum e x_hat     dv = r (q - x_hat mean(q x_hat))
//   gate first: ds = dv silu(z), dz = dv s silu'(z)     norm first: ds = dv, dz = dy w x_hat silu'(z)
// One unit of work is a block of rows, which has a row of partial to itself.
void rms_norm_gated_backward(const RmsNormGatedBackward& a, int64_t begin, int64_t end) {
  const int64_t groups = a.dim / a.group;
  const bool gate_first = a.z && !a.norm_before_gate, gate_last = a.z && a.norm_before_gate;
  for (int64_t block = begin; block < end; ++block) {
    float* partial = a.partial + block * a.dim;
    std::memset(partial, 0, a.dim * sizeof(float));
    const int64_t rows_end = (block + 1) * a.rows_per_block < a.rows ? (block + 1) * a.rows_per_block : a.rows;
    for (int64_t row = block * a.rows_per_block; row < rows_end; ++row) {
      const int64_t dy = a.offset(a.dy, row), s = a.offset(a.s, row), z = a.offset(a.z, row);
      const int64_t dx = a.offset(a.dx, row), dz = a.offset(a.dz, row);
      const int64_t dsum = a.offset(a.dsum, row), dresidual = a.offset(a.dresidual, row);
      for (int64_t g = 0; g < groups; ++g) {
        const float r = a.rstd[row * groups + g];
        const int64_t first = g * a.group, last = first + a.group;
        vf dot = {};
        for (int64_t d = first; d < last; d += W) {
          const int64_t n = last - d;
          const vf gate = a.z ? silu(load(a.z, z + d, n)) : splat(1.f);
          vf x_hat = load(a.s, s + d, n) * r, e = load(a.dy, dy + d, n);
          if (gate_first) x_hat *= gate;
          if (gate_last) e *= gate;
          const vf ex = e * x_hat;
          store(partial + d, load(partial + d, n) + ex, n);
          dot = fma(ex, load(a.weight + d, n), dot);
        }
        const float mean = sum(dot) / float(a.group);
        for (int64_t d = first; d < last; d += W) {
          const int64_t n = last - d;
          const vf w = load(a.weight + d, n), sv = load(a.s, s + d, n), zv = a.z ? load(a.z, z + d, n) : vf{};
          const vf gate = a.z ? silu(zv) : splat(1.f), dyv = load(a.dy, dy + d, n);
          const vf x_hat = gate_first ? sv * r * gate : sv * r;
          const vf q = gate_last ? dyv * gate * w : dyv * w;
          const vf dv = (q - x_hat * mean) * r;
          if (a.dz) {
            const vf at_gate = gate_first ? dv * sv : dyv * w * x_hat;
            store(a.dz, dz + d, at_gate * silu_grad(zv), n);
          }
          vf ds = gate_first ? dv * gate : dv;
          if (a.dsum) ds += load(a.dsum, dsum + d, n);
          store(a.dx, dx + d, ds, n);
          if (a.dresidual) store(a.dresidual, dresidual + d, ds, n);
        }
      }
    }
  }
}

}  // namespace pyseq::PYSEQ_ISA
