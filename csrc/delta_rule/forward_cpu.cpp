#include "delta_rule/forward_chunk.h"
#include "delta_rule/forward_exact.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// Which form. A token by itself costs two products with the state, one more for a decay and two for a correction; one
// in a chunk costs two, or four with a correction, and work inside the chunk, which counts the less the larger the
// state. With AVX-512 that breaks even with a decay at 64 x 64, with a decay and a correction at 128 x 128, and without
// a decay not below 256 x 256. A few heads, or sequences of a few chunks, leave chunks nothing to gain: the sequential
// form also divides the columns of a state among threads.
bool in_chunks(const DeltaRule& s) {
  if (s.form != DeltaForm::by_shape) return s.form == DeltaForm::chunks;
  const bool large = s.keys * s.values >= (s.a ? 128 * 256 : 64 * 128);
  return s.g && large && s.sequences * s.heads >= kFewHeads && s.batch * s.time >= kDeltaKeep * s.sequences;
}
int64_t width_of_unit(const DeltaRule& s) { return in_chunks(s) ? s.values : columns_of_unit(s); }

}  // namespace

int64_t delta_rule_forward_units(const DeltaRule& s) {
  return s.sequences * s.heads * parts_of(s, width_of_unit(s));
}
int64_t delta_rule_forward_scratch(const DeltaRule& s) {
  return in_chunks(s) ? ChunkForward::size(s) : Block::size(s, columns_of_unit(s));
}

void delta_rule_forward(const DeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u = unit_at(s, width_of_unit(s), unit);
    for_case(s, [&]<bool corrected, bool decayed>() {
      if (in_chunks(s)) forward_chunks<corrected, decayed>(s, u);
      else forward_exactly<corrected, decayed>(s, u);
    });
    clear_unneeded(s, u);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
