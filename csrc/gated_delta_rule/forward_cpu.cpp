#include "gated_delta_rule/forward_sequential.h"

namespace pyseq::PYSEQ_ISA {

int64_t gated_delta_rule_forward_units(const GatedDeltaRule& s) { return s.sequences * s.value_heads; }
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule& s) { return Block::size(s); }

void gated_delta_rule_forward(const GatedDeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  with_gate(gate_of(s), [&]<Gate gate> {
    for (int64_t unit = begin; unit < end; ++unit) forward_sequentially<gate>(s, unit);
  });
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
