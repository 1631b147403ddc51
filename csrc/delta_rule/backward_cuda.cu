#include "cuda/device.cuh"
#include "delta_rule/backward.cuh"

namespace pyseq {

int64_t delta_rule_backward_workspace(const DeltaRule& s) { return delta_rule::Plan(s).floats; }

int delta_rule_backward_cuda(const DeltaRule& s, void* stream) {
  if (s.heads == 0 || s.sequences == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.heads, s.sequences})
    if (size > delta_rule::kLongest) return cudaErrorInvalidValue;
  if (int error = delta_rule::delta_rule_chunks_cuda(s, stream)) return error;
  return s.sequence_of || delta_rule::Plan(s).parts > 1 ? delta_rule::delta_rule_finish_cuda(s, stream) : 0;
}

}  // namespace pyseq
