// What arrives behind each segment, exp(delta A) g of its next token: first as if nothing arrived there from later segments,
// which is linear, then with that: carry[i - 1] += exp(A sum of delta over segment i) carry[i].
#include "selective_scan/backward_span.cuh"

namespace pyseq {
namespace {

__global__ void __launch_bounds__(kThreads, 4) selective_scan_backward_carry_kernel(SelectiveScan s, Workspace w) {
  Shared& m = *dynamic_smem<Shared>();   // up to p
  const Place at(s, w, blockIdx.x);
  const Sequences q(s, at.row);
  const int slice = int(blockIdx.y);
  if (at.segment == 0 || q.invalid()) return;   // nothing is before, or NaN is written in any case
  float A[4][4], g[4][4] = {}, sum[4] = {};
  bool cut = at.end == s.time || q.starts(at.end);
  if (cut) load_end(g, q, at.end, s, at, slice);
  load_decay(A, s, at, slice);
  const Weights weights(s, at);
#pragma unroll 1
  for (int64_t t0 = at.begin + (at.end - at.begin - 1) / kSpan * kSpan; t0 >= at.begin; t0 -= kSpan) {
    const int tokens = int(at.end - t0 < kSpan ? at.end - t0 : kSpan);
    const unsigned starts = q.starts(t0, tokens, at.lane);
    Inputs in;
    load_channels(in, s, w, at, t0, tokens, true);
    load_shared(in, s, at, t0, tokens, slice);
    __syncthreads();   // all have read the span behind
    stage_channels(m, in, weights, s, at, true);
    stage_shared(m, in, s);
    __syncthreads();
#pragma unroll 1
    for (int t = tokens - 1; t >= 0; --t) {
      const Vec<4> delta = load_vec<4>(m.delta[t] + 4 * at.quad), dv = load_vec<4>(m.dv[t] + 4 * at.quad);
      const Vec<4> C = load_vec<4>(m.C[t] + 4 * at.sl);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[c] += delta[c];
#pragma unroll
        for (int n = 0; n < 4; ++n) g[c][n] = ex2(delta[c] * A[c][n]) * fmaf(C[n], dv[c], g[c][n]);
      }
      if (starts >> t & 1) load_end(g, q, t0 + t, s, at, slice), cut = true;
    }
  }
  store_own(w.carry + ((int64_t(blockIdx.x) - 1) * w.slices + slice) * kTile, g);
  if (slice > 0 || at.sl > 0) return;
  Vec<4> decay;
#pragma unroll
  for (int c = 0; c < 4; ++c) decay[c] = cut ? __int_as_float(0x7f800000) : sum[c];
  store_vec<4>(w.decay + int64_t(blockIdx.x) * kThreads + 4 * at.quad, decay);
}

// A block per unit and slice, from the last segment to the first. Threads beyond the channels add zeros.
__global__ void __launch_bounds__(kThreads) selective_scan_backward_join_kernel(SelectiveScan s, Workspace w) {
  const Place at(s, w, blockIdx.x * w.segments);
  const int slice = int(blockIdx.y);
  float A[4][4], carry[4][4], behind[4][4] = {};
  load_decay(A, s, at, slice);
  for (int64_t i = (at.unit + 1) * w.segments - 2; i >= at.unit * w.segments; --i) {
    float* const own = w.carry + (i * w.slices + slice) * kTile;
    const Vec<4> decay = load_vec<4>(w.decay + (i + 1) * kThreads + 4 * at.quad);
    load_own(carry, own);
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float sum = decay[k / 4], a = sum < __int_as_float(0x7f800000) ? ex2(sum * A[k / 4][k % 4]) : 0.f;
      behind[k / 4][k % 4] = fmaf(a, behind[k / 4][k % 4], carry[k / 4][k % 4]);
    }
    store_own(own, behind);
  }
}

}  // namespace

int selective_scan_backward_carry_cuda(const SelectiveScan& s, void* stream) {
  const Workspace w(s);
  const dim3 grid(unsigned(w.units * w.segments), unsigned(w.slices)), threads(kThreads);
  const size_t bytes = offsetof(Shared, p);
  if (int error = launch<selective_scan_backward_carry_kernel>(grid, threads, bytes, stream, s, w)) return error;
  return launch<selective_scan_backward_join_kernel>(dim3(unsigned(w.units), unsigned(w.slices)), threads, 0, stream, s, w);
}

}  // namespace pyseq
