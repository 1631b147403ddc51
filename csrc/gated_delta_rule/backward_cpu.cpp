// The gradient, from the last span of kGatedDeltaKeep tokens to the first. The state before a span was kept; those
// before its chunks, and U, are computed again.
#include "gated_delta_rule/backward_chunk.h"
#include "gated_delta_rule/backward_tokens.h"

namespace pyseq::PYSEQ_ISA {
namespace {

struct Span {
  int64_t begin, end, number;   // tokens, and which of its sequence
  int64_t chunks() const { return (end - begin + kTokens - 1) / kTokens; }
};

void fetch(const GatedDeltaRule& s, const Sequence& q, int64_t begin, int64_t head) {
  const int64_t shared = head / (s.value_heads / s.heads);
  prefetch<0>(s.k, q, begin, shared, s.keys);
  prefetch<0>(s.q, q, begin, shared, s.keys);
  prefetch<0>(s.v, q, begin, head, s.values);
}

// What the forward left of the chunks of a span: operands, U and E, and the state before each.
template <Gate gate>
void replay(const GatedDeltaRule& s, const Sequence& q, const Span& span, const Work& w, Chunk* chunks,
            int64_t head) {
  load_state(w.S[0], state_of(s, static_cast<const float*>(s.kept), q.slot + span.number, head), s.keys, s.values);
  for (int64_t i = 0; i < span.chunks(); ++i) {
    Chunk& c = chunks[i];
    c.begin = span.begin + i * kTokens, c.tokens = std::min<int64_t>(kTokens, span.end - c.begin);
    load_chunk<gate>(s, q, c, head);
    if (i + 1 < span.chunks()) fetch(s, q, c.begin + kTokens, head);
    if (s.dy) prefetch<0>(s.dy, q, c.begin, head, s.values);
    multiply_tokens<gate>(s, c, w.x);
    for (int64_t p = 0; p < w.panel_count; ++p) {
      const int64_t state = p * w.width * kPanel, tokens = p * kTokens * kPanel;
      correct(s, q, c, head, p * kPanel, w.S[i] + state, w.U[i] + tokens, w.E[i] + tokens);
      if (i + 1 < span.chunks()) carry<gate>(c, w.S[i] + state, w.U[i] + tokens, w.S[i + 1] + state);
    }
  }
}

void store_rows(const GatedDeltaRule& s, const Sequence& q, const Span& span, const Work& w, int64_t shared) {
  for (int64_t t = span.begin; t < span.end; ++t) {
    const int64_t from = (t - span.begin) * w.width;
    const int64_t dq = row_at(s.dq, q, t, shared), dk = row_at(s.dk, q, t, shared);
    for (int64_t i = 0; i < s.keys; i += W) {
      store(s.dq, dq + i, load(w.dq + from + i), s.keys - i);
      store(s.dk, dk + i, load(w.dk + from + i), s.keys - i);
    }
  }
}

template <Gate gate> void walk(const GatedDeltaRule& s, const Work& w, Chunk* chunks, int64_t unit) {
  const Sequence q = sequence_at(s, unit / s.heads);
  const int64_t shared = unit % s.heads, size = state_size(s.keys, s.values), first = shared * w.heads;
  for (int64_t h = 0; h < w.heads; ++h) {
    load_state(w.G + h * size, state_of(s, s.dstate_out, q.number, first + h), s.keys, s.values);
  }
  for (int64_t n = (q.end - q.begin + kGatedDeltaKeep - 1) / kGatedDeltaKeep - 1; n >= 0; --n) {
    const int64_t begin = q.begin + n * kGatedDeltaKeep;
    const Span span = {begin, std::min(begin + kGatedDeltaKeep, q.end), n};
    std::fill_n(w.dq, kGatedDeltaKeep * w.width, 0.f);
    std::fill_n(w.dk, kGatedDeltaKeep * w.width, 0.f);
    for (int64_t h = 0; h < w.heads; ++h) {
      replay<gate>(s, q, span, w, chunks, first + h);
      for (int64_t i = span.chunks() - 1; i >= 0; --i) {
        prefetch<1>(s.dv, q, chunks[i].begin, first + h, s.values);
        if (i == 0 && h + 1 < w.heads) fetch(s, q, begin, first + h + 1);
        if (i == 0 && h + 1 == w.heads && n > 0) fetch(s, q, begin - kGatedDeltaKeep, first);
        walk_panels<gate>(s, q, chunks[i], w, i, first + h, w.G + h * size);
        finish<gate>(s, q, chunks[i], w, first + h, Rows(w, i));
      }
    }
    store_rows(s, q, span, w, shared);
  }
  for (int64_t h = 0; s.dstate && h < w.heads; ++h) {
    store_state(state_of(s, s.dstate, q.number, first + h), w.G + h * size, s.keys, s.values);
  }
}

}  // namespace

int64_t gated_delta_rule_backward_units(const GatedDeltaRule& s) { return s.sequences * s.heads; }
int64_t gated_delta_rule_backward_scratch(const GatedDeltaRule& s) {
  Scratch from{nullptr};
  const Work w(s, from);
  for (int i = 0; i < kChunks; ++i) Chunk(s, from);
  return from.used;
}

void gated_delta_rule_backward(const GatedDeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  Scratch from{s.scratch};
  const Work w(s, from);
  Chunk chunks[kChunks] = {Chunk(s, from), Chunk(s, from), Chunk(s, from), Chunk(s, from)};
  with_gate(gate_of(s), [&]<Gate gate> {
    for (int64_t unit = begin; unit < end; ++unit) walk<gate>(s, w, chunks, unit);
  });
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
