// The gradient, chunk by chunk from the last. Forward left the state before every 64th token: the states before the
// chunks in between are computed again from it, then those chunks are walked back.
#include "delta_rule/backward_keys.h"

namespace pyseq::PYSEQ_ISA {
namespace {

struct Work {
  Sizes sizes;
  Chunk chunks[kChunks];
  Gradients gradients;
  int64_t floats;   // in all

  Work(const DeltaRule& s, Scratch m) : sizes(s), gradients(sizes, m) {
    for (Chunk& c : chunks) c = Chunk(sizes, m);
    floats = m.used;
  }
};

// A state, or zeros, to rows of whole vectors.
void read_state(const Sizes& z, const float* from, float* to) {
  if (from) load_rows(to, from, z.values, z.keys, z.values);
  else std::fill_n(to, z.keys * z.value_width, 0.f);
}

void read_gradient(const DeltaRule& s, const Sizes& z, const Place& here, float* dy) {
  read_rows(dy, s.dy, here, z.values);
  for (int64_t i = 0; i < kTokens * z.value_width; i += W) store(dy + i, s.scale * load(dy + i));
}

// What is read of the span before, the rows of its chunk i and a part of the state before it, and then, so that they
// are still near, the rows that chunk i of this span writes.
Ahead rows_ahead(const DeltaRule& s, const Place& here, const Place& soon, const float* kept, int64_t i) {
  Ahead ahead;
  const int64_t first = s.keys * i / kChunks, last = s.keys * (i + 1) / kChunks;
  const View state{const_cast<float*>(kept), DType::f32, {0, s.values, 0}};
  for (const View* x : {&s.dq, &s.dk, &s.da, &s.db}) ahead.add(*x, here, s.keys, true);
  if (!s.one_decay) ahead.add(s.dg, here, s.keys, true);
  ahead.add(s.dv, here, s.values, true);
  ahead.add(state, {0, first, last - first, 0}, s.values, false);
  for (const View* x : {&s.q, &s.k, &s.a, &s.b}) ahead.add(*x, soon, s.keys, false);
  if (!s.one_decay) ahead.add(s.g, soon, s.keys, false);
  for (const View* x : {&s.v, &s.dy}) ahead.add(*x, soon, s.values, false);
  return ahead;
}

void walk_chunk(const DeltaRule& s, const Work& w, const Place& here, const Chunk& c, Ahead ahead) {
  const Sizes& z = w.sizes;
  const Gradients& x = w.gradients;
  read_gradient(s, z, here, x.dy);
  gradient_products(z, c, x, ahead);
  ahead.fetch(INT64_MAX);   // the rest, where there were few products
  for (int64_t t = 0; t < here.tokens; ++t) {
    for (int64_t e = 0; e < z.values; e += W) {
      store(s.dv, here.at(s.dv, t) + e, load(x.dv + t * z.value_width + e), z.values - e);
    }
  }
  if (z.corrected) gradient_of_keys<true>(s, z, here, c, x);
  else gradient_of_keys<false>(s, z, here, c, x);
}

// One head of one sequence.
void walk(const DeltaRule& s, int64_t sequence, int64_t head) {
  const Work w(s, {s.scratch});
  const Sizes& z = w.sizes;
  const bool packed = s.cu_seqlens;
  const int64_t row = packed ? 0 : sequence, begin = packed ? s.cu_seqlens[sequence] : 0;
  const int64_t end = packed ? s.cu_seqlens[sequence + 1] : s.time, slot = delta_slot(s.time, s.cu_seqlens, sequence);
  const int64_t number = sequence * s.heads + head, state_size = s.keys * s.values;
  const auto place = [&](int64_t t) {
    return Place{row, t, t < begin ? 0 : std::min<int64_t>(kTokens, end - t), head};
  };
  read_state(z, s.dstate_out ? s.dstate_out + number * state_size : nullptr, w.gradients.G);
  for (int64_t span = (end - begin - 1) / kDeltaKeep; end > begin && span >= 0; --span) {
    const int64_t first = begin + span * kDeltaKeep, tokens = std::min(kDeltaKeep, end - first);
    const int64_t count = (tokens + kTokens - 1) / kTokens;
    const float* const kept = s.kept + ((slot + span) * s.heads + head) * state_size;
    read_state(z, kept, w.chunks[0].state);
    for (int64_t i = 0; i < count; ++i) {
      const Chunk& c = w.chunks[i];
      read_chunk(s, z, place(first + i * kTokens), c);
      if (z.corrected) score_tokens<true>(z, c), correct(z, c);
      else score_tokens<false>(z, c);
      if (i + 1 < count) advance(z, c, w.chunks[i + 1].state);
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      const int64_t t = first + i * kTokens;
      const float* const before = span > 0 ? kept - s.heads * state_size : nullptr;
      walk_chunk(s, w, place(t), w.chunks[i], rows_ahead(s, place(t), place(t - kDeltaKeep), before, i));
    }
  }
  for (int64_t d = 0; s.dstate && d < z.keys; ++d) {
    std::copy_n(w.gradients.G + d * z.value_width, z.values, s.dstate + number * state_size + d * z.values);
  }
}

}  // namespace

int64_t delta_rule_backward_units(const DeltaRule& s) { return s.sequences * s.heads; }
int64_t delta_rule_backward_scratch(const DeltaRule& s) { return Work(s, {nullptr}).floats; }

// Sequences lie side by side: threads share long ones evenly.
void delta_rule_backward(const DeltaRule& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) walk(s, unit % s.sequences, unit / s.sequences);
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
