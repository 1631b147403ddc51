#include "ema/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kAhead = 4;   // rows

// x[t] - y[t-1] of one chunk, from the y before its first token on.
template <class E, bool whole>
void differences(const Ema& s, const Block& block, int64_t t, int64_t tokens, const float* p, vf (&y)[kVectors], float* to) {
  for (int64_t i = 0; i < tokens; ++i) {
    const E* const row = block.at<const E>(s.x, t + i);
    fetch(row - (kEmaChunk - kAhead) * s.x.stride[1]);   // the chunk before, which is next
    each_vector<whole>(block, [&](int64_t v, int64_t lanes) {
      const vf x = load(row + v * W, lanes);
      store(to + i * kEmaBlock + v * W, x - y[v]);
      y[v] = next(splat(p[i]), x, y[v]);
    });
  }
}

// Back through one chunk; `g` is (1 - p) g of the token behind it, and becomes that of its first.
template <class E, bool whole>
void walk(const EmaBackward& b, const Block& block, int64_t t, int64_t tokens, const float* p, const float* difference,
          vf (&g)[kVectors]) {
  const Ema& s = b.forward;
  float* const partial = b.partial + (block.row * ema_blocks(s.dim) + block.index) * s.time + t;
  for (int64_t i = tokens - 1; i >= 0; --i) {
    const E* const dy = b.dy ? block.at<const E>(b.dy, t + i) : nullptr;
    E* const dx = block.at<E>(b.dx, t + i);
    if (dy) fetch(dy - kAhead * b.dy.stride[1]);
    fetch(dx - kAhead * b.dx.stride[1]);
    const vf weight = splat(p[i]);
    vf total{};
    each_vector<whole>(block, [&](int64_t v, int64_t lanes) {
      if (dy) g[v] += load(dy + v * W, lanes);
      store(dx + v * W, weight * g[v], lanes);
      total = fma(g[v], load(difference + i * kEmaBlock + v * W), total);
      g[v] = remain(weight, g[v]);
    });
    partial[i] = sum(total);
  }
}

template <class E, bool whole> void walk_row(const EmaBackward& b, const Block& block) {
  const Ema& s = b.forward;
  alignas(64) float p[kEmaChunk], difference[kEmaChunk * kEmaBlock];
  vf y[kVectors], g[kVectors];
  for (int64_t i = sequences_of_row(s) - 1; i >= 0; --i) {
    const Sequence sequence = sequence_at(s, block, i);
    load_states<whole>(g, of_sequence(b.dstate_out, s, block, sequence.index), block);
    for (int64_t end = sequence.end, t; end > sequence.begin; end = t) {
      t = (end - 1) / kEmaChunk * kEmaChunk;
      const bool first = t <= sequence.begin;
      if (first) t = sequence.begin;
      load_weights(p, s, block, t, end - t);
      load_states<whole>(y, first ? of_sequence(s.state, s, block, sequence.index) : block.kept(s, t), block);
      differences<E, whole>(s, block, t, end - t, p, y, difference);
      walk<E, whole>(b, block, t, end - t, p, difference, g);
    }
    if (b.dstate) store_states<whole>(of_sequence(b.dstate, s, block, sequence.index), g, block);
  }
}

}  // namespace

void ema_backward(const EmaBackward& b, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block(b.forward, unit);
    for_block(b.forward, block, [&]<class E, bool whole>() { walk_row<E, whole>(b, block); });
  }
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
