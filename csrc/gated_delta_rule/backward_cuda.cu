#include "gated_delta_rule/kernel.h"

namespace pyseq {

int64_t gated_delta_rule_backward_workspace(const GatedDeltaRule&) { return 0; }
int gated_delta_rule_backward_cuda(const GatedDeltaRule&, void*) { return 0; }

}  // namespace pyseq
