#include "gated_delta_rule/forward.cuh"

namespace pyseq {
namespace {

constexpr int64_t kTokensAtLeast = 32;   // of a sequence, on average: below, a chunk is mostly empty

// A function of shape and dtype alone.
bool in_chunks(const GatedDeltaRule& s) {
  if (s.form == GatedDeltaForm::sequential || !gated_delta_rule_chunks_fit(s)) return false;
  return s.form == GatedDeltaForm::chunks || s.batch * s.time >= kTokensAtLeast * s.sequences;
}

}  // namespace

int64_t gated_delta_rule_forward_workspace(const GatedDeltaRule&) { return 0; }

int gated_delta_rule_forward_cuda(const GatedDeltaRule& s, void* stream) {
  if (s.sequences == 0 || s.value_heads == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.value_heads, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  return in_chunks(s) ? gated_delta_rule_chunks_cuda(s, stream) : gated_delta_rule_steps_cuda(s, stream);
}

}  // namespace pyseq
