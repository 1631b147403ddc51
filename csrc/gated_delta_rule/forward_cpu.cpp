#include "gated_delta_rule/forward_chunk.h"
#include "gated_delta_rule/forward_sequential.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// The form by shape. Per token and element of the state, the sequential form takes three operations and a fourth for
// a decay; chunks take little more than three, and per chunk what does not grow with both K and V. So chunks pay
// where there is a decay and the state is larger than 64 x 64; measured on Zen 4.
bool sequentially(const GatedDeltaRule& s) {
  if (s.form != GatedDeltaForm::by_shape) return s.form == GatedDeltaForm::sequential;
  const int64_t length = s.cu_seqlens ? s.time / std::max<int64_t>(s.sequences, 1) : s.time;
  return !s.g || s.keys * s.values <= 64 * 64 || length < kTokens;
}

}  // namespace

int64_t gated_delta_rule_forward_units(const GatedDeltaRule& s) { return s.sequences * s.value_heads; }
int64_t gated_delta_rule_forward_scratch(const GatedDeltaRule& s) {
  return sequentially(s) ? Block::size(s) : forward_chunks_scratch(s);
}

void gated_delta_rule_forward(const GatedDeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  with_gate(gate_of(s), [&]<Gate gate> {
    const auto forward = sequentially(s) ? forward_sequentially<gate> : forward_in_chunks<gate>;
    for (int64_t unit = begin; unit < end; ++unit) forward(s, unit);
  });
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
