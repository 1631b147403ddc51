#include "gated_delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {

int64_t gated_delta_rule_backward_units(const GatedDeltaRule&) { return 0; }
int64_t gated_delta_rule_backward_scratch(const GatedDeltaRule&) { return 0; }
void gated_delta_rule_backward(const GatedDeltaRule&, int64_t, int64_t) {}

}  // namespace pyseq::PYSEQ_ISA
