// What the forms of the forward share: which tokens a sequence has, and where its states are.
#pragma once
#include "delta_rule/update.cuh"

namespace pyseq {

int delta_rule_steps_cuda(const DeltaRule&, void* stream);
bool delta_rule_chunks_fit(const DeltaRule&);
int delta_rule_chunk_cuda(const DeltaRule&, void* stream);

namespace {

struct Span {
  int row, begin, end;   // of the batch; tokens
  bool valid;
  int64_t slot;          // of its first kept state
};

// Where cu_seqlens is not valid the sequences share all tokens, to write NaN, and nothing is read through it.
__device__ __forceinline__ Span span_of(const DeltaRule& s, int sequence) {
  if (!s.cu_seqlens)
    return {sequence, 0, int(s.time), true, delta_slot(s.time, nullptr, sequence)};
  if (s.sequence_of[0] < 0)
    return {0, int(s.time * sequence / s.sequences), int(s.time * (sequence + 1) / s.sequences), false, 0};
  return {0, int(s.cu_seqlens[sequence]), int(s.cu_seqlens[sequence + 1]), true,
          delta_slot(s.time, s.cu_seqlens, sequence)};
}

}  // namespace
}  // namespace pyseq
