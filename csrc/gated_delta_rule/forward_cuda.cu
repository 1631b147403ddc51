#include "gated_delta_rule/kernel.h"

namespace pyseq {

int64_t gated_delta_rule_forward_workspace(const GatedDeltaRule&) { return 0; }
int gated_delta_rule_forward_cuda(const GatedDeltaRule&, void*) { return 0; }

}  // namespace pyseq
