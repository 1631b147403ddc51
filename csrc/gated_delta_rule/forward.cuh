// What the forms of the forward and the backward share: which tokens a sequence has, and where its states are.
#pragma once
#include "gated_delta_rule/update.cuh"

namespace pyseq {

int gated_delta_rule_steps_cuda(const GatedDeltaRule&, void* stream);   // any dtypes, sizes and decays
bool gated_delta_rule_chunks_fit(const GatedDeltaRule&);
int gated_delta_rule_chunks_cuda(const GatedDeltaRule&, void* stream);

namespace {

constexpr int kC = 16;   // tokens of a chunk

struct Span {
  int row, begin, end, slot;   // of the batch; tokens; its first kept state
  bool valid;
};

// Where cu_seqlens is not valid the sequences share all tokens, to write NaN, and nothing is read through it.
__device__ __forceinline__ Span span_of(const GatedDeltaRule& s, int sequence) {
  if (!s.cu_seqlens) return {sequence, 0, int(s.time), int(gated_delta_slot(s.time, nullptr, sequence)), true};
  if (s.sequence_of[0] < 0)
    return {0, int(s.time * sequence / s.sequences), int(s.time * (sequence + 1) / s.sequences), 0, false};
  return {0, int(s.cu_seqlens[sequence]), int(s.cu_seqlens[sequence + 1]),
          int(gated_delta_slot(s.time, s.cu_seqlens, sequence)), true};
}

}  // namespace
}  // namespace pyseq
