// From the last span of a row to its first. A warp computes x[t] - y[t-1] of its 16 tokens from the y that was kept before
// them, walks back from zero for what it passes on, and once more, when the warps are joined, from what came to it. dp is
// summed over the channels of a warp, and by a second launch over the tiles of a row, in their order.
#include "ema/update.cuh"

namespace pyseq {
namespace {

// What comes before the first token of a warp: none there where a sequence begins, which is seen later.
__device__ __forceinline__ Pair fetch_kept(const Ema& s, const Place& at, int64_t t, int tokens) {
  return tokens && t > 0 ? at.load_state(s, at.kept(s, t) - at.channel, 0) : Pair{};
}

// The sums over all lanes of 16 numbers each has: that of number lane / 2. Each exchange halves the numbers.
__device__ __forceinline__ float sum_tokens(float (&part)[kTokens], int lane) {
#pragma unroll
  for (int half = kTokens / 2; half > 0; half /= 2) {
    const bool high = lane & 2 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = high ? part[i] : part[i + half];
      part[i] = (high ? part[i + half] : part[i]) + __shfl_xor_sync(~0u, sent, 2 * half);
    }
  }
  return part[0] + __shfl_xor_sync(~0u, part[0], 1);
}

// A thread of 16-bit data has 64 registers of rows and differences, so that two blocks fit; one of float32 has 96.
template <class E> constexpr int kResident = sizeof(E) == 2 ? 2 : 1;

template <class E> __global__ void __launch_bounds__(kThreads, kResident<E>) ema_backward_kernel(EmaBackward b, bool wide) {
  __shared__ Spans m;
  const Ema& s = b.forward;
  const Place at(s);
  if (invalid(s)) return fill_nan<E>(s, at, b.dx, b.dstate, wide);
  const int spans = (int(s.time) + kSpan - 1) / kSpan;
  int t = (spans - 1) * kSpan + at.warp * kTokens;
  int tokens = tokens_from(s, t), stage = 0;
  Raw<E> x[kTokens];
  fetch_rows<E>(x, s.x, at, t, tokens, wide);
  float* const partial = b.partial + (int64_t(at.row) * ema_tiles(s.dim) + at.tile) * s.time;
  Pair g{};   // what leaves the span behind; the same in all warps
#pragma unroll 1
  for (int span = spans; span > 0; --span, stage ^= 1) {
    const Token token(s, at, t, tokens);
    const unsigned starts = token.starts(tokens, at.lane), ends = token.ends(tokens, at.lane);
    Raw<E> dy[kTokens];
    fetch_rows<E>(dy, b.dy, at, t, tokens, wide);   // needed later than x, which is on its way from the span before on
    share_weights(m, at, token.p);
    Pair y = fetch_kept(s, at, t, tokens), difference[kTokens];
    each_token<false>(m, at, [&](int i, float p) {
      if (starts >> i & 1) y = at.load_state(s, s.state, sequence_of(s, at, t + i));
      const Pair now = unpack<E>(x[i]);
      difference[i] = {{now[0] - y[0], now[1] - y[1]}};
      y = next(p, now, y);
    });
    const int coming = t - kSpan;
    const int more = span > 1 ? kTokens : 0;
    fetch_rows<E>(x, s.x, at, coming, more, wide);

    Pair own{};
    float forgotten = 0.f, part[kTokens];
    each_token<true>(m, at, [&](int i, float p) {
      if (ends >> i & 1) own = at.load_state(s, b.dstate_out, sequence_of(s, at, t + i));
      own = remain(p, add(own, unpack<E>(dy[i])));
      forgotten = next(p, 1.f, forgotten);
      if (starts >> i & 1) own = {};
    });
    Pair mine = join<true>(m, stage, at, own, forgotten, starts | ends, g);
    E* dx = at.at<E>(b.dx, t + kTokens - 1);
    each_token<true>(m, at, [&](int i, float p) {
      if (ends >> i & 1) mine = at.load_state(s, b.dstate_out, sequence_of(s, at, t + i));
      mine = add(mine, unpack<E>(dy[i]));
      if (i < tokens) at.put(dx, {{p * mine[0], p * mine[1]}}, wide);
      dx -= b.dx.stride[1];
      part[i] = fmaf(mine[0], difference[i][0], mine[1] * difference[i][1]);
      mine = remain(p, mine);
      if (starts >> i & 1) at.store_state(s, b.dstate, sequence_of(s, at, t + i), mine);
    });
    const float sum = sum_tokens(part, at.lane);
    if (at.lane % 2 == 0 && at.lane / 2 < tokens) partial[t + at.lane / 2] = sum;
    t = coming, tokens = more;
  }
  each_empty(s, at, [&](int64_t i) { at.store_state(s, b.dstate, i, at.load_state(s, b.dstate_out, i)); });
}

__global__ void __launch_bounds__(kThreads) ema_sum_kernel(EmaBackward b) {
  const Ema& s = b.forward;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, tiles = ema_tiles(s.dim);
  if (i >= s.batch * s.time) return;
  const float* const from = b.partial + i / s.time * tiles * s.time + i % s.time;
  float sum = invalid(s) ? NAN : 0.f;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * s.time];
  store(b.dp, i, sum);
}

}  // namespace

int ema_backward_cuda(const EmaBackward& b, void* stream) {
  const Ema& s = b.forward;
  const int error = for_dtype(s, [&]<class E>() {
    const bool wide = wide_rows(s, s.x) && wide_rows(s, b.dy) && wide_rows(s, b.dx);
    return launch<ema_backward_kernel<E>>(dim3(unsigned(blocks_of(s))), dim3(kThreads), 0, stream, b, wide);
  });
  const int64_t blocks = (s.batch * s.time + kThreads - 1) / kThreads;
  if (error || blocks == 0) return error;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  return launch<ema_sum_kernel>(dim3(unsigned(blocks)), dim3(kThreads), 0, stream, b);
}

}  // namespace pyseq
