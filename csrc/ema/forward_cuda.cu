// One launch. A warp goes through its 16 tokens of a span twice, both times from registers: from zero, for what it passes
// on, and, when the warps are joined, from what came to it. The rows of the next span are on their way meanwhile.
#include "ema/update.cuh"

namespace pyseq {
namespace {

template <class E> __global__ void __launch_bounds__(kThreads, 2) ema_forward_kernel(Ema s, bool wide) {
  __shared__ Spans m;
  const Place at(s);
  if (invalid(s)) {
    fill_nan<E>(s, at, s.y, s.state_out, wide);
    for (int64_t t = (at.warp + 1) * kTokens; s.kept && t < s.time; t += kSpan)
      at.store_state(s, at.kept(s, t) - at.channel, 0, both(NAN));
    return;
  }
  int64_t t = at.warp * kTokens;
  int tokens = tokens_from(s, t), stage = 0;
  Raw<E> x[kTokens];
  fetch_rows<E>(x, s.x, at, t, tokens, wide);
  Token token(s, at, t, tokens);
  Pair y{};   // what leaves the span before; the same in all warps
#pragma unroll 1
  for (int64_t first = 0; first < s.time; first += kSpan, stage ^= 1) {
    const unsigned starts = token.starts(tokens, at.lane), ends = token.ends(tokens, at.lane);
    share_weights(m, at, token.p);
    const int64_t coming = t + kSpan;
    const int more = tokens_from(s, coming);
    Raw<E> after[kTokens];
    fetch_rows<E>(after, s.x, at, coming, more, wide);
    token = Token(s, at, coming, more);

    Pair own{};
    float forgotten = 0.f;
    each_token<false>(m, at, [&](int i, float p) {
      if (starts >> i & 1) own = at.load_state(s, s.state, sequence_of(s, at, t + i));
      own = next(p, unpack<E>(x[i]), own);
      forgotten = next(p, 1.f, forgotten);
    });
    Pair mine = join<false>(m, stage, at, own, forgotten, starts, y);
    if (s.kept && tokens && t > 0) at.store_state(s, at.kept(s, t) - at.channel, 0, mine);
    E* const to = at.at<E>(s.y, t);
    each_token<false>(m, at, [&](int i, float p) {
      if (starts >> i & 1) mine = at.load_state(s, s.state, sequence_of(s, at, t + i));
      mine = next(p, unpack<E>(x[i]), mine);
      if (i < tokens) at.put(to + i * s.y.stride[1], mine, wide);
      if (ends >> i & 1) at.store_state(s, s.state_out, sequence_of(s, at, t + i), mine);
      x[i] = after[i];
    });
    t = coming, tokens = more;
  }
  each_empty(s, at, [&](int64_t i) { at.store_state(s, s.state_out, i, at.load_state(s, s.state, i)); });
}

}  // namespace

int ema_forward_cuda(const Ema& s, void* stream) {
  return for_dtype(s, [&]<class E>() {
    const bool wide = wide_rows(s, s.x) && wide_rows(s, s.y);
    return launch<ema_forward_kernel<E>>(dim3(unsigned(blocks_of(s))), dim3(kThreads), 0, stream, s, wide);
  });
}

}  // namespace pyseq
