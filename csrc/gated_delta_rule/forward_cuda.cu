#include "gated_delta_rule/forward.cuh"

namespace pyseq {

int64_t gated_delta_rule_forward_workspace(const GatedDeltaRule&) { return 0; }

int gated_delta_rule_forward_cuda(const GatedDeltaRule& s, void* stream) {
  if (s.sequences == 0 || s.value_heads == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.value_heads, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  return gated_delta_rule_steps_cuda(s, stream);
}

}  // namespace pyseq
