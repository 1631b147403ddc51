#include "delta_rule/forward_exact.h"

namespace pyseq::PYSEQ_ISA {

int64_t delta_rule_forward_units(const DeltaRule& s) {
  return s.sequences * s.heads * parts_of(s, columns_of_unit(s));
}
int64_t delta_rule_forward_scratch(const DeltaRule& s) { return Block::size(s, columns_of_unit(s)); }

void delta_rule_forward(const DeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) forward_exactly(s, unit);
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
