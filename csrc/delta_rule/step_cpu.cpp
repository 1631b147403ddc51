#include "delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {

void delta_rule_step(const DeltaRuleStep&, int64_t, int64_t) {}

}  // namespace pyseq::PYSEQ_ISA
