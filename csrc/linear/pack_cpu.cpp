#include "linear/pack.h"

namespace pyseq::PYSEQ_ISA {

void linear_pack(const PackLinear& p, int64_t begin, int64_t end) {
  const bool pairs = p.w.type == DType::bf16;
  const int64_t depth = pairs ? (p.K + 1) / 2 : p.K;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel;
    pack_strip(p.w, pairs, first, std::min(kPanel, p.N - first), kPanel, 0, p.K, p.panels + panel * depth * kPanel);
  }
}

}  // namespace pyseq::PYSEQ_ISA
