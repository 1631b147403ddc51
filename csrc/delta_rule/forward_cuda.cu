#include "delta_rule/forward.cuh"

namespace pyseq {

int64_t delta_rule_forward_workspace(const DeltaRule&) { return 0; }

int delta_rule_forward_cuda(const DeltaRule& s, void* stream) {
  if (s.sequences == 0 || s.heads == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.heads, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  return delta_rule_steps_cuda(s, stream);
}

}  // namespace pyseq
