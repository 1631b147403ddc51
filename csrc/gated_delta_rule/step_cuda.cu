#include "gated_delta_rule/kernel.h"

namespace pyseq {

int gated_delta_rule_step_cuda(const GatedDeltaRuleStep&, void*) { return 0; }

}  // namespace pyseq
