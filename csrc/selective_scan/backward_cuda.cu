// Walks back through a segment one chunk of 64 tokens at a time. From the checkpoint before the chunk the state goes forward
// once, and is kept before every span of 8 tokens; then span after span, last first:
//
//   forward again, keeping p[t] = a[t] h[t-1] in shared memory, a = exp(delta A)
//   back: h = p + delta u B,   g = C dv + (a g)[t+1],   q = g p,   and with it all sums of the gradient
//   the sums over states and over channels, taken across threads;   du, ddt, dz and the slab of dB and dC are stored
//
// No atomics, and every sum in a fixed order: the same bits every run. The wider the states, the more slices of 16 a span is
// walked through in.
#include "selective_scan/backward_span.cuh"

namespace pyseq {
namespace {

// (i) of a chunk: keeps the state before each span but the first.
__device__ __forceinline__ void keep_spans(const float (&A_0)[4][4], Shared& m, const Weights& weights, const SelectiveScan& s, const Workspace& w,
                                           const Place& at, const Sequences& q, int64_t from, int64_t end, float* kept) {
  float A[4][4], h[4][4];
  for (int i = 0; i < 16; ++i) A[i / 4][i % 4] = A_0[i / 4][i % 4];
  const int slices = int(w.slices), held = int(w.held());
#pragma unroll 1
  for (int span = 0; from + (span + 1) * kSpan < end; ++span) {
    const int64_t t0 = from + span * kSpan;
    const unsigned starts = q.starts(t0, kSpan, at.lane);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      float* const mine = kept + slice * held * kTile;
      Inputs in;
      if (slice == 0) load_channels(in, s, w, at, t0, kSpan, false);
      load_shared(in, s, at, t0, kSpan, slice);
      if (slices > 1) load_decay(A, s, at, slice);
      if (span == 0) load_checkpoint(h, s, at, from, slice);
      else if (slices > 1) load_own(h, mine + (span - 1) * kTile);
      __syncthreads();   // all have read what the span before left
      if (slice == 0) stage_channels(m, in, weights, s, at, false);
      stage_shared(m, in, s);
      __syncthreads();
      walk_forward<false>(h, A, m, s, at, q, t0, kSpan, starts, slice);
      store_own(mine + span * kTile, h);
    }
  }
}

template <bool gated>
__global__ void __launch_bounds__(kThreads, 2) selective_scan_backward_kernel(SelectiveScan s, Workspace w) {
  Shared& m = *dynamic_smem<Shared>();
  const Place at(s, w, blockIdx.x);
  const Sequences q(s, at.row);
  const int slices = int(w.slices), held = int(w.held());
  const int64_t width = w.slices * kSlice;
  float* const slab = w.slabs + at.unit * s.time * 2 * width;
  if (q.invalid()) return fill_nan(s, w, at, slab);
  float* const kept = w.kept + blockIdx.x * w.slices * held * kTile;
  float A[4][4], g[4][4], dA[4][4] = {};
  Weights weights(s, at);
#pragma unroll 1
  for (int slice = slices - 1; slice >= 0; --slice) {   // g: exp(delta A) g of the token behind
    load_decay(A, s, at, slice);
    if (at.end == s.time) pass_empty(q, at.end, s, at, slice);
    if (at.end < s.time && !q.starts(at.end)) load_own(g, w.carry + (blockIdx.x * w.slices + slice) * kTile);
    else if (at.end > 0) load_end(g, q, at.end, s, at, slice);
    float* const mine = kept + (slice * held + kKept) * kTile;
    if (slices > 1) store_own(mine, g), store_own(mine + kTile, dA);
  }
#pragma unroll 1
  for (int64_t from = (at.end + kChunk - 1) / kChunk * kChunk - kChunk; from >= at.begin; from -= kChunk) {
    const int64_t end = from + kChunk < at.end ? from + kChunk : at.end;
    keep_spans(A, m, weights, s, w, at, q, from, end, kept);
#pragma unroll 1
    for (int span = int(end - from - 1) / kSpan; span >= 0; --span) {
      const int64_t t0 = from + span * kSpan;
      const int tokens = int(end - t0 < kSpan ? end - t0 : kSpan);
      const unsigned starts = q.starts(t0, tokens, at.lane);
      Inputs in;
      load_channels(in, s, w, at, t0, tokens, true);
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        float* const mine = kept + slice * held * kTile;
        if (slices > 1) {
          load_decay(A, s, at, slice);
          load_own(g, mine + kKept * kTile), load_own(dA, mine + (kKept + 1) * kTile);
        }
        float h[4][4];
        if (span == 0) load_checkpoint(h, s, at, from, slice);
        else load_own(h, mine + (span - 1) * kTile);
        load_shared(in, s, at, t0, tokens, slice);
        __syncthreads();   // all have read what the span before left
        if (slice == 0) stage_channels(m, in, weights, s, at, true);
        stage_shared(m, in, s);
        __syncthreads();
        walk_forward<true>(h, A, m, s, at, q, t0, tokens, starts, slice);
        walk_back<gated>(g, dA, A, m, s, at, q, t0, tokens, starts, slice);
        if (slices > 1) store_own(mine + kKept * kTile, g), store_own(mine + (kKept + 1) * kTile, dA);
        __syncthreads();   // the sums of every thread are there
        sum_channels(m, at, slab, width, t0, tokens, slice);
        sum_states(m, in, weights, s, w, at, t0, tokens, slice);
      }
    }
  }
  const int64_t row = at.row * w.segments + at.segment;
  for (int slice = 0; slice < slices; ++slice) {
    if (slices > 1) load_own(dA, kept + (slice * held + kKept + 1) * kTile);
    store_tile(w.dA + row * s.dim * s.states, dA, s, at, slice);
  }
  sum_weights(m, weights, s, w, at);
}

}  // namespace

int64_t selective_scan_backward_workspace(const SelectiveScan& s) { return Workspace(s).floats; }

int selective_scan_backward_cuda(const SelectiveScan& s, void* stream) {
  const Workspace w(s);
  if (const int64_t grid = w.units * w.segments; grid > 0) {
    if (w.segments > 1) {
      if (int error = selective_scan_backward_carry_cuda(s, stream)) return error;
    }
    const size_t bytes = w.slices > 1 ? sizeof(Shared) : s.z ? offsetof(Shared, sums) : offsetof(Shared, v);
    const dim3 blocks{unsigned(grid)}, threads{kThreads};
    const int error = s.z ? launch<selective_scan_backward_kernel<true>>(blocks, threads, bytes, stream, s, w)
                          : launch<selective_scan_backward_kernel<false>>(blocks, threads, bytes, stream, s, w);
    if (error) return error;
  }
  return selective_scan_reduce_cuda(s, stream);
}

}  // namespace pyseq
