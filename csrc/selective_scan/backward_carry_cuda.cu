// What arrives behind each segment, exp(delta A) g of its next token: first as if nothing came from later segments, and
// then with that, which is linear: carry[i - 1] += exp(A sum of delta over segment i) carry[i].
#include "selective_scan/backward_span.cuh"

namespace pyseq {
namespace {

constexpr int kInfinity = 0x7f800000;
constexpr int kAtOnce = 4;   // segments whose carries are on their way together

__global__ void __launch_bounds__(kThreads, 4) selective_scan_backward_carry_kernel(SelectiveScan s, Workspace w) {
  Shared& m = *dynamic_smem<Shared>();   // up to p
  const Place at(s, w, blockIdx.x);
  const int slice = int(blockIdx.y);
  if (at.segment == 0 || at.sequence.invalid()) return;   // nothing is before, or NaN is written in any case
  Tile A, g = {};
  Vec<4> sum{};
  bool cut = at.end == s.time || at.sequence.starts(at.end);
  if (cut) load_end(g, at.end, at, slice);
  load_A(A, at, slice);
  stage_weights(m, at);
  const int64_t last = at.begin + (at.end - at.begin - 1) / kSpan * kSpan;
  Cursors cursors(at, last);
#pragma unroll 1
  for (int64_t t0 = last; t0 >= at.begin; t0 -= kSpan, cursors.move(w.span, -1)) {
    const int tokens = int(at.end - t0 < kSpan ? at.end - t0 : kSpan);
    const unsigned starts = at.starts(t0, tokens);
    Inputs in;
    load_channels<Pass::carry>(in, cursors, at, tokens);
    load_shared(in, cursors, at, tokens, slice);
    __syncthreads();   // all have read what was staged before
    stage_channels<Pass::carry>(m, in, at);
    stage_shared(m, in, at);
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
      if (starts >> t & 1) load_end(g, t0 + t, at, slice), cut = true;
    }
  }
  store_own(w.carry + ((int64_t(blockIdx.x) - 1) * w.slices + slice) * kTileFloats, g);
  if (slice > 0 || at.sl > 0) return;
#pragma unroll
  for (int c = 0; c < 4; ++c) sum[c] = cut ? __int_as_float(kInfinity) : sum[c];
  store_vec<4>(w.decay + int64_t(blockIdx.x) * kThreads + 4 * at.quad, sum);
}

// A block per unit and slice, from the last segment to the first.
__global__ void __launch_bounds__(kThreads) selective_scan_backward_join_kernel(SelectiveScan s, Workspace w) {
  const Place at(s, w, blockIdx.x * w.segments);
  const int slice = int(blockIdx.y);
  const int64_t first = at.unit * w.segments, stride = w.slices * kTileFloats;
  float* const carry = w.carry + slice * kTileFloats;
  Tile A, behind = {};
  load_A(A, at, slice);
#pragma unroll 1
  for (int64_t last = first + w.segments - 2; last >= first; last -= kAtOnce) {
    Tile own[kAtOnce];
    Vec<4> decay[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (last - k < first) break;
      decay[k] = load_vec<4>(w.decay + (last - k + 1) * kThreads + 4 * at.quad);
      load_own(own[k], carry + (last - k) * stride);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (last - k < first) break;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int c = i / 4, n = i % 4;
        // Half the exponent at a time, as in the forward: zeros stay zeros, and a large factor of a small g is not lost.
        const float root = ex2(0.5f * decay[k][c] * A[c][n]);
        const bool alone = decay[k][c] == __int_as_float(kInfinity) || behind[c][n] == 0.f;
        behind[c][n] = alone ? own[k][c][n] : fmaf(root, root * behind[c][n], own[k][c][n]);
      }
      store_own(carry + (last - k) * stride, behind);
    }
  }
}

}  // namespace

int selective_scan_backward_carry_cuda(const SelectiveScan& s, void* stream) {
  const Workspace w(s);
  const dim3 segments{unsigned(w.units * w.segments), unsigned(w.slices)}, units{unsigned(w.units), unsigned(w.slices)};
  const dim3 threads{kThreads};
  const size_t bytes = offsetof(Shared, p);
  if (int error = launch<selective_scan_backward_carry_kernel>(segments, threads, bytes, stream, s, w)) return error;
  return launch<selective_scan_backward_join_kernel>(units, threads, 0, stream, s, w);
}

}  // namespace pyseq
