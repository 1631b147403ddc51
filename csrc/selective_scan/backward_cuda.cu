// Walks back through a segment, one chunk of 64 tokens at a time. From the checkpoint before the chunk the state goes
// forward once, and is kept before every span of 8 tokens; then span after span, last first:
//
//   forward again, with p[t] = a[t] h[t-1] kept in shared memory, a = exp(delta A)
//   back: h = p + delta u B,   g = C dv + (a g)[t+1],   r = g p,   and with them every product of the gradient
//   their sums over states and over channels;   du, ddt, dz and the slab of dB and dC are stored
//
// No atomics, and every sum in a fixed order: the same bits every run. A span is walked through once per 16 states.
// Two blocks share a multiprocessor: that is what their shared memory leaves room for, so 255 registers cost nothing.
#include "selective_scan/backward_span.cuh"

namespace pyseq {
namespace {

// The state before each span of the chunk [from, end) but the first. A_0: of slice 0.
__device__ __forceinline__ void keep_states(float* kept, const Tile& A_0, Shared& m,
                                            Cursors inputs, const Place& at, int64_t from, int64_t end) {
  Tile A, h;
#pragma unroll
  for (int i = 0; i < 16; ++i) A[i / 4][i % 4] = A_0[i / 4][i % 4];
  const int slices = int(at.w.slices);
#pragma unroll 1
  for (int span = 0; from + (span + 1) * kSpan < end; ++span) {
    const int64_t t0 = from + span * kSpan;
    const unsigned starts = at.starts(t0, kSpan);
    Inputs in;
    const auto load_slice = [&](int slice) {
      load_shared(in, inputs, at, kSpan, slice);
      if (slices > 1) load_A(A, at, slice);
      if (span == 0) load_checkpoint(h, from, at, slice);
      else if (slices > 1) load_own(h, kept + (slice * at.w.held() + span - 1) * kTileFloats);
    };
    load_channels<Pass::forward>(in, inputs, at, kSpan);
    load_slice(0);
    __syncthreads();   // all have read what was staged before
    stage_channels<Pass::forward>(m, in, at);
#pragma unroll 1
    for (int slice = 0;;) {
      float* const mine = kept + slice * at.w.held() * kTileFloats;
      stage_shared(m, in, at);
      __syncthreads();
      walk_forward<false>(h, A, m, at, t0, kSpan, starts, slice);
      store_own(mine + span * kTileFloats, h);
      if (++slice == slices) break;
      load_slice(slice);
      __syncthreads();
    }
    inputs.move_inputs(at.w.span, 1);
  }
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 2) selective_scan_backward_kernel(SelectiveScan s, Workspace w) {
  Shared& m = *dynamic_smem<Shared>();
  const Place at(s, w, blockIdx.x);
  if (at.sequence.invalid()) return fill_nan(at);
  const int slices = int(w.slices);
  const int64_t held = w.held() * kTileFloats, g_kept = kKept * kTileFloats, dA_kept = g_kept + kTileFloats;
  float* const kept = w.kept + blockIdx.x * slices * held;
  Tile A, g, dA = {};   // g: exp(delta A) g of the token behind
  Gradients sums = {};
  stage_weights(m, at);
#pragma unroll 1
  for (int slice = slices - 1; slice >= 0; --slice) {
    load_A(A, at, slice);
    if (at.end == s.time) pass_empty(at.end, at, slice);
    const bool continues = at.end < s.time && !at.sequence.starts(at.end);
    if (continues) load_own(g, w.carry + (blockIdx.x * w.slices + slice) * kTileFloats);
    else if (at.end > 0) load_end(g, at.end, at, slice);
    if (slices > 1) store_own(kept + slice * held + g_kept, g), store_own(kept + slice * held + dA_kept, dA);
  }
  int64_t from = (at.end + kChunk - 1) / kChunk * kChunk - kChunk;
  const int64_t slab_step = kSpan * 2 * w.width();
  Cursors cursors(at, from);
  float* slab = slab_of(at, from);
#pragma unroll 1
  for (; from >= at.begin; from -= kChunk) {
    const int64_t end = from + kChunk < at.end ? from + kChunk : at.end;
    const int last = int(end - from - 1) / kSpan;
    keep_states(kept, A, m, cursors, at, from, end);
    cursors.move(w.span, last);
    slab += last * slab_step;
#pragma unroll 1
    for (int span = last; span >= 0; --span) {
      const int64_t t0 = from + span * kSpan;
      const int tokens = int(end - t0 < kSpan ? end - t0 : kSpan);
      const unsigned starts = at.starts(t0, tokens);
      Inputs in;
      Tile h;
      const auto load_slice = [&](int slice) {
        const float* const mine = kept + slice * held;
        load_shared(in, cursors, at, tokens, slice);
        if (slices > 1) load_A(A, at, slice), load_own(g, mine + g_kept), load_own(dA, mine + dA_kept);
        if (span == 0) load_checkpoint(h, from, at, slice);
        else load_own(h, mine + (span - 1) * kTileFloats);
      };
      load_channels<Pass::back>(in, cursors, at, tokens);
      load_slice(0);
      __syncthreads();   // all have read what was staged before
      const Row u = stage_channels<Pass::back>(m, in, at);
#pragma unroll 1
      for (int slice = 0;;) {
        float* const mine = kept + slice * held;
        stage_shared(m, in, at);
        __syncthreads();
        walk_forward<true>(h, A, m, at, t0, tokens, starts, slice);
        walk_back<kGated>(g, dA, A, m, at, t0, tokens, starts, slice);
        if (slices > 1) store_own(mine + g_kept, g), store_own(mine + dA_kept, dA);
        __syncthreads();   // the sums of every thread are there
        sum_channels(m, slab, at, tokens, slice);
        sum_states(m, u, sums, cursors, at, tokens, slice);
        if (++slice == slices) break;
        load_slice(slice);
        __syncthreads();
      }
      cursors.move(w.span, -1);
      slab -= slab_step;
    }
    cursors.move(w.span, 1 - kChunk / kSpan);
    slab -= (kChunk / kSpan - 1) * slab_step;
  }
  for (int slice = 0; slice < slices; ++slice) {
    if (slices > 1) load_own(dA, kept + slice * held + dA_kept);
    store_tile(states_of(w.dA, at.row * w.segments + at.segment, at), dA, at, slice);
  }
  sum_weights(m, sums, at);
}

}  // namespace

int64_t selective_scan_backward_workspace(const SelectiveScan& s) { return Workspace(s).floats; }

int selective_scan_backward_cuda(const SelectiveScan& s, void* stream) {
  const Workspace w(s);
  if (w.units > 0) {
    if (int error = w.segments > 1 ? selective_scan_backward_carry_cuda(s, stream) : 0) return error;
    const dim3 grid{unsigned(w.units * w.segments)}, threads{kThreads};
    const size_t bytes = w.slices > 1 ? sizeof(Shared) : s.z ? offsetof(Shared, sums) : offsetof(Shared, v);
    const int error = s.z ? launch<selective_scan_backward_kernel<true>>(grid, threads, bytes, stream, s, w)
                          : launch<selective_scan_backward_kernel<false>>(grid, threads, bytes, stream, s, w);
    if (error) return error;
  }
  return selective_scan_reduce_cuda(s, stream);
}

}  // namespace pyseq
