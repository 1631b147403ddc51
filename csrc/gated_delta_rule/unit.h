// What all passes share: which tokens a sequence has, where its tensors lie, and the state in panels of columns.
#pragma once
#include <algorithm>

#include "cpu/tile.h"
#include "gated_delta_rule/token.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// The state of a head in scratch is cut into panels of kPanel columns, each [padded_keys, kPanel] by itself, so that
// one stays in the first-level cache: 16 KB for 128 keys. Rows behind K and columns behind V are zero.
constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * W;

inline int64_t panels(int64_t values) { return (values + kPanel - 1) / kPanel; }
inline int64_t padded_keys(int64_t keys) { return (keys + 15) / 16 * 16; }
inline int64_t state_size(int64_t keys, int64_t values) { return panels(values) * padded_keys(keys) * kPanel; }

// Pieces of the scratch of a thread, 64-byte aligned.
struct Scratch {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* const piece = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

struct Sequence {
  int64_t number, row, begin, end;   // row of the batch, tokens [begin, end)
  int64_t slot, slot_end;            // of its kept states, and of the next sequence's
};

inline Sequence sequence_at(const GatedDeltaRule& s, int64_t i) {
  const int64_t slot = gated_delta_slot(s.time, s.cu_seqlens, i);
  const int64_t all = gated_delta_slots(s.batch, s.time, s.sequences, s.cu_seqlens);
  const int64_t slot_end = i + 1 < s.sequences ? gated_delta_slot(s.time, s.cu_seqlens, i + 1) : all;
  if (!s.cu_seqlens) return {i, i, 0, s.time, slot, slot_end};
  return {i, 0, s.cu_seqlens[i], s.cu_seqlens[i + 1], slot, slot_end};
}

// Element of head `head` of token t, of a tensor with rows per head; and of one with numbers per head.
inline int64_t row_at(const View& x, const Sequence& q, int64_t t, int64_t head) {
  return q.row * x.stride[0] + t * x.stride[1] + head * x.stride[2];
}
inline int64_t number_at(const View& x, const Sequence& q, int64_t t, int64_t head) {
  return q.row * x.stride[0] + t * x.stride[1] + head;
}

// A state [K, V] to panels and back; null: zeros.
inline void load_state(float* to, const float* from, int64_t keys, int64_t values) {
  for (int64_t p = 0; p < values; p += kPanel) {
    for (int64_t i = 0; i < padded_keys(keys); ++i, to += kPanel) {
      for (int n = 0; n < kPanelVectors; ++n) {
        const int64_t column = p + n * W;
        const bool there = from && i < keys && column < values;
        store(to + n * W, there ? load(from + i * values + column, values - column) : vf{});
      }
    }
  }
}
inline void store_state(float* to, const float* from, int64_t keys, int64_t values) {
  for (int64_t p = 0; p < values; p += kPanel, from += padded_keys(keys) * kPanel) {
    for (int64_t i = 0; i < keys; ++i) {
      for (int64_t column = p; column < p + kPanel && column < values; column += W) {
        store(to + i * values + column, load(from + i * kPanel + column - p), values - column);
      }
    }
  }
}

// Where the state [K, V] of a head in an array of states [.., HV, K, V] is; null stays null.
template <class T> inline T* state_of(const GatedDeltaRule& s, T* states, int64_t i, int64_t head) {
  return states ? states + (i * s.value_heads + head) * s.keys * s.values : nullptr;
}

// Keeps the state before token t where it is due. After the last token: zeros in the slots that no token needs.
inline void keep(const GatedDeltaRule& s, const Sequence& q, int64_t t, int64_t head, const float* S) {
  if (!s.kept) return;
  const int64_t n = t - q.begin, slot = q.slot + (n + kGatedDeltaKeep - 1) / kGatedDeltaKeep;
  if (t < q.end) {
    if (n % kGatedDeltaKeep == 0) store_state(state_of(s, s.kept, slot, head), S, s.keys, s.values);
    return;
  }
  for (int64_t i = slot; i < q.slot_end; ++i) std::fill_n(state_of(s, s.kept, i, head), s.keys * s.values, 0.f);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
