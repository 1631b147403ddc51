#include "delta_rule/forward_chunk.h"
#include "delta_rule/forward_exact.h"

namespace pyseq::PYSEQ_ISA {
namespace {

bool in_chunks(const DeltaRule& s) { return s.form == DeltaForm::chunks; }
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
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
