// Where a unit of work lies: some columns of the state of one head in one sequence.
#pragma once
#include <algorithm>

#include "cpu/tile.h"
#include "delta_rule/kernel.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kFewHeads = 8;   // of all sequences together: fewer may be fewer than there are threads

struct Unit {
  int64_t sequence, row, begin, end;   // tokens [begin, end) of batch row `row`
  int64_t head, column, columns;

  int64_t at(const View& x, int64_t t) const { return row * x.stride[0] + t * x.stride[1] + head * x.stride[2]; }
};

// `width` columns to a unit.
inline int64_t parts_of(const DeltaRule& s, int64_t width) { return (s.values + width - 1) / width; }
inline Unit unit_at(const DeltaRule& s, int64_t width, int64_t unit) {
  Unit u{};
  u.column = unit % parts_of(s, width) * width;
  u.columns = std::min(width, s.values - u.column);
  unit /= parts_of(s, width);
  u.head = unit % s.heads;
  u.sequence = unit / s.heads;
  u.row = s.cu_seqlens ? 0 : u.sequence;
  u.begin = s.cu_seqlens ? s.cu_seqlens[u.sequence] : 0;
  u.end = s.cu_seqlens ? s.cu_seqlens[u.sequence + 1] : s.time;
  return u;
}

// W log decays of token t, from key k.
inline vf log_decay(const DeltaRule& s, const Unit& u, int64_t t, int64_t k) {
  if (!s.one_decay) return load(s.g, u.at(s.g, t) + k, s.keys - k);
  return splat(load(s.g, u.row * s.g.stride[0] + t * s.g.stride[1] + u.head, 1)[0]);
}

// One head of a packed array of states [n, H, K, V], at the unit's first column.
inline int64_t state_at(const DeltaRule& s, const Unit& u, int64_t n) {
  return (n * s.heads + u.head) * s.keys * s.values + u.column;
}
// The state that is kept before token t of the sequence, or null.
inline float* kept_at(const DeltaRule& s, const Unit& u, int64_t t) {
  if (!s.kept || (t - u.begin) % kDeltaKeep != 0) return nullptr;
  return s.kept + state_at(s, u, delta_slot(s.time, s.cu_seqlens, u.sequence) + (t - u.begin) / kDeltaKeep);
}
// Zeros in those that no token of the sequence needs, up to the next sequence's.
inline void clear_unneeded(const DeltaRule& s, const Unit& u) {
  if (!s.kept) return;
  const int64_t used = (u.end - u.begin + kDeltaKeep - 1) / kDeltaKeep;
  const int64_t next = delta_slot(s.time, s.cu_seqlens, u.sequence + 1);
  for (int64_t i = delta_slot(s.time, s.cu_seqlens, u.sequence) + used; i < next; ++i) {
    float* const to = s.kept + state_at(s, u, i);
    for (int64_t k = 0; k < s.keys; ++k) std::fill_n(to + k * s.values, u.columns, 0.f);
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
