// Which form computes: a function of shape alone.
#include "delta_rule/forward.cuh"

namespace pyseq {
namespace {

// Chunks pay off where sequences are long, on the average, and have a kernel for up to 64 keys.
bool in_chunks(const DeltaRule& s) {
  constexpr int64_t kLong = 64;
  if (s.form == DeltaForm::sequential || !delta_rule_chunks_fit(s)) return false;
  return s.form == DeltaForm::chunks || s.batch * s.time >= kLong * s.sequences;
}

}  // namespace

int64_t delta_rule_forward_workspace(const DeltaRule&) { return 0; }

int delta_rule_forward_cuda(const DeltaRule& s, void* stream) {
  if (s.sequences == 0 || s.heads == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.heads, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  return in_chunks(s) ? delta_rule_chunk_cuda(s, stream) : delta_rule_steps_cuda(s, stream);
}

}  // namespace pyseq
