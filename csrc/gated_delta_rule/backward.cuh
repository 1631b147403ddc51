// What the launches of the backward hand on.
#pragma once
#include "gated_delta_rule/chunk.cuh"

namespace pyseq {

// In float32, each block's part of what is summed over columns and over the heads that share q and k: [parts, B, T, HV]
// rows of K numbers, or of one. And e, [B, T, HV, V].
struct Partials {
  float *q, *k, *g, *beta, *e;
};

int gated_delta_rule_reduce_cuda(const GatedDeltaRule&, const Partials&, int parts, void* stream);

}  // namespace pyseq
