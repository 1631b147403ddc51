#include "gated_delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {

void gated_delta_rule_step(const GatedDeltaRuleStep&, int64_t, int64_t) {}

}  // namespace pyseq::PYSEQ_ISA
