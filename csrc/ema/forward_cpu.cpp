#include "ema/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kAhead = 4;   // rows

template <class E, bool whole>
void scan(const Ema& s, const Block& block, const Sequence& sequence, vf (&y)[kVectors]) {
  alignas(64) float p[kEmaChunk];
  for (int64_t t = sequence.begin, tokens; t < sequence.end; t += tokens) {
    tokens = kEmaChunk - t % kEmaChunk < sequence.end - t ? kEmaChunk - t % kEmaChunk : sequence.end - t;
    load_weights(p, s, block, t, tokens);
    if (s.kept && t > 0 && t % kEmaChunk == 0) store_states<whole>(block.kept(s, t), y, block);
    for (int64_t i = 0; i < tokens; ++i) {
      const E* const from = block.at<const E>(s.x, t + i);
      E* const to = block.at<E>(s.y, t + i);
      fetch(from + kAhead * s.x.stride[1]);
      fetch(to + kAhead * s.y.stride[1]);
      each_vector<whole>(block, [&](int64_t v, int64_t lanes) {
        y[v] = next(splat(p[i]), load(from + v * W, lanes), y[v]);
        store(to + v * W, y[v], lanes);
      });
    }
  }
}

template <class E, bool whole> void scan_row(const Ema& s, const Block& block) {
  vf y[kVectors];
  for (int64_t i = 0; i < sequences_of_row(s); ++i) {
    const Sequence sequence = sequence_at(s, block, i);
    load_states<whole>(y, of_sequence(s.state, s, block, sequence.index), block);
    scan<E, whole>(s, block, sequence, y);
    if (s.state_out) store_states<whole>(of_sequence(s.state_out, s, block, sequence.index), y, block);
  }
}

}  // namespace

void ema_forward(const Ema& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block(s, unit);
    for_block(s, block, [&]<class E, bool whole>() { scan_row<E, whole>(s, block); });
  }
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
