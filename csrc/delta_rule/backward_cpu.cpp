#include "delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {

int64_t delta_rule_backward_units(const DeltaRule&) { return 0; }
int64_t delta_rule_backward_scratch(const DeltaRule&) { return 0; }
void delta_rule_backward(const DeltaRule&, int64_t, int64_t) {}

}  // namespace pyseq::PYSEQ_ISA
