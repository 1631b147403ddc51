#include "gated_delta_rule/forward_chunk.h"
#include "gated_delta_rule/forward_sequential.h"

namespace pyseq::PYSEQ_ISA {
namespace {

bool sequentially(const GatedDeltaRule& s) { return s.form != GatedDeltaForm::chunks; }

}  // namespace

int64_t gated_delta_rule_forward_units(const GatedDeltaRule& s) { return s.sequences * s.value_heads; }
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule& s) {
  return sequentially(s) ? Block::size(s) : forward_chunks_scratch(s);
}

void gated_delta_rule_forward(const GatedDeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  with_gate(gate_of(s), [&]<Gate gate> {
    const auto forward = sequentially(s) ? forward_sequentially<gate> : forward_in_chunks<gate>;
    for (int64_t unit = begin; unit < end; ++unit) forward(s, unit);
  });
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
