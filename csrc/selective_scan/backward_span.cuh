// The walk through one span of 8 tokens, forward and back, and the sums over its threads.
#pragma once
#include "cuda/opaque.cuh"
#include "selective_scan/backward_stage.cuh"
#include "selective_scan/backward_tile.cuh"

namespace pyseq {
namespace {

constexpr float kLn2 = 0.693147181f;

// h through the span, from one start of a sequence to the next. A is pre-scaled by log2 e.
template <bool kKeep>
__device__ __forceinline__ void walk_forward(Tile& h, const Tile& A, Shared& m, const Place& at, int64_t t0, int tokens,
                                             unsigned starts, int slice) {
#pragma unroll 1
  for (int t = 0; t < tokens;) {
    const int next = __ffs(starts >> t >> 1), end = next ? t + next : tokens;
    if (starts >> t & 1) load_start(h, t0 + t, at, opaque(slice));
#pragma unroll 1
    for (; t < end; ++t) {
      const Vec<4> delta = load_vec<4>(m.delta[t] + 4 * at.quad), du = load_vec<4>(m.du[t] + 4 * at.quad);
      const Vec<4> B = load_vec<4>(m.B[t] + 4 * at.sl);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        Vec<4> p;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          p[n] = ex2(delta[c] * A[c][n]) * h[c][n];
          h[c][n] = fmaf(du[c], B[n], p[n]);
        }
        if (kKeep) store_vec<4>(m.p[t].of[c][threadIdx.x], p);
      }
    }
  }
}

// v of channel 4 quad + sl, from what the four lanes that share the channels have of each.
__device__ __forceinline__ float sum_lanes(const Vec<4>& v, int sl) {
  const bool high = sl / 2, odd = sl % 2;
  const float v0 = (high ? v[2] : v[0]) + __shfl_xor_sync(~0u, high ? v[0] : v[2], 16);
  const float v1 = (high ? v[3] : v[1]) + __shfl_xor_sync(~0u, high ? v[1] : v[3], 16);
  return (odd ? v1 : v0) + __shfl_xor_sync(~0u, odd ? v0 : v1, 8);
}

// One token. g arrives as exp(delta A) g of the token behind, and leaves as that of this one.
template <bool kGated>
__device__ __forceinline__ void step_back(Tile& g, Tile& dA, const Tile& A, Shared& m, const Place& at, int t,
                                          int slice) {
  const Vec<4> delta = load_vec<4>(m.delta[t] + 4 * at.quad), du = load_vec<4>(m.du[t] + 4 * at.quad);
  const Vec<4> dv = load_vec<4>(m.dv[t] + 4 * at.quad);
  const Vec<4> B = load_vec<4>(m.B[t] + 4 * at.sl), C = load_vec<4>(m.C[t] + 4 * at.sl);
  Vec<4> S1{}, S2{}, dB{}, dC{}, v{};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec<4> p = load_vec<4>(m.p[t].of[c][threadIdx.x]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float a = ex2(delta[c] * A[c][n]), h = fmaf(du[c], B[n], p[n]);
      const float g_t = fmaf(C[n], dv[c], g[c][n]), r = g_t * p[n];
      dB[n] = fmaf(g_t, du[c], dB[n]);
      dC[n] = fmaf(h, dv[c], dC[n]);
      S1[c] = fmaf(g_t, B[n], S1[c]);
      S2[c] = fmaf(r, A[c][n], S2[c]);
      dA[c][n] = fmaf(r, delta[c], dA[c][n]);
      if (kGated) v[c] = fmaf(h, C[n], v[c]);
      g[c][n] = a * g_t;
    }
  }
  store_vec<4>(m.p[t].of[0][threadIdx.x], S1);
  store_vec<4>(m.p[t].of[1][threadIdx.x], S2);
  store_vec<4>(m.p[t].of[2][threadIdx.x], dB);
  store_vec<4>(m.p[t].of[3][threadIdx.x], dC);
  if (kGated) {
    float* const to = &m.v[t][4 * at.quad + at.sl];
    *to = sum_lanes(v, at.sl) + (slice ? *to : 0.f);
  }
}

template <bool kGated>
__device__ __forceinline__ void walk_back(Tile& g, Tile& dA, const Tile& A, Shared& m, const Place& at, int64_t t0,
                                          int tokens, unsigned starts, int slice) {
#pragma unroll 1
  for (int end = tokens; end > 0;) {
    const unsigned before = starts & ((1u << end) - 1);
    const int begin = before ? 31 - __clz(int(before)) : 0;
#pragma unroll 1
    for (int t = end - 1; t >= begin; --t) step_back<kGated>(g, dA, A, m, at, t, slice);
    if (before) {   // a sequence starts at `begin`
      const int this_slice = opaque(slice);
      if (at.s.dstate) store_tile(states_of(at.s.dstate, at.sequence.at(t0 + begin), at), g, at, this_slice);
      pass_empty(t0 + begin, at, this_slice);
      if (t0 + begin > 0) load_end(g, t0 + begin, at, this_slice);
    }
    end = begin;
  }
}

// dB and dC, summed over the 32 threads that share their states. A warp takes the states of one sl; a lane one token,
// one of the two, and the threads of two warps. slab: where the lane's sums go, for the first slice.
__device__ __forceinline__ void sum_channels(const Shared& m, float* slab, const Place& at, int tokens, int slice) {
  const int t = at.lane % 8, kind = at.lane / 8 % 2, half = at.lane / 16;
  const auto& from = m.p[t].of[2 + kind];
  Vec<4> sum{};
  if (t < tokens) {
    sum = load_vec<4>(from[64 * half + 8 * at.warp]);
#pragma unroll
    for (int i = 1; i < 16; ++i) {
      const Vec<4> x = load_vec<4>(from[64 * half + 8 * at.warp + i / 8 * 32 + i % 8]);
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] += x[n];
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) sum[n] += __shfl_xor_sync(~0u, sum[n], 16);
  if (half == 0 && t < tokens) store_vec<4>(slab + slice * kSlice, sum);
}
__device__ __forceinline__ float* slab_of(const Place& at, int64_t t0) {
  const int t = at.lane % 8, kind = at.lane / 8 % 2;
  return at.w.slabs + ((at.unit * at.s.time + t0 + t) * 2 + kind) * at.w.width() + 4 * at.warp;
}

// Of D and dt_bias, for the thread's channels over its tokens.
struct Gradients {
  Row dD, dbias;
};

// S1 = <B, g> and S2 = <A, r>, summed over the 4 lanes that share their channels; after the last slice du, ddt and dz.
__device__ __forceinline__ void sum_states(Shared& m, const Row& u, Gradients& sums, const Cursors& to,
                                           const Place& at, int tokens, int slice) {
  const SelectiveScan& s = at.s;
  const int t = at.token, from = at.column / 8 * 32 + at.column % 8;
  if (t >= tokens) return;
  Row S[2];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Vec<4> x = load_vec<4>(m.p[t].of[i / 8][from + i / 4 % 2 * kHalf + i % 4 * 8]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float& sum = S[i / 8][i / 4 % 2 * 4 + c];
      sum = i % 4 ? sum + x[c] : x[c];
    }
  }
  if (slice > 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row before = load_row(m.sums[i][t], at);
#pragma unroll
      for (int c = 0; c < 8; ++c) S[i][c] += before[c];
    }
  }
  if (slice + 1 < at.w.slices) {
    store_row(m.sums[0][t], S[0], at);
    store_row(m.sums[1][t], S[1], at);
    return;
  }
  const Row delta = load_row(m.delta[t], at), dv = load_row(m.dv[t], at);
  const Row D = load_row(m.D, at);
  Row du, ddt;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    du[i] = fmaf(delta[i], S[0][i], D[i] * dv[i]);
    ddt[i] = fmaf(u[i], S[0][i], kLn2 * S[1][i]);   // A carries log2 e
    sums.dD[i] = fmaf(dv[i], u[i], sums.dD[i]);
  }
  if (s.dt_softplus) {
    const Row slope = load_row(m.slope[t], at);
#pragma unroll
    for (int i = 0; i < 8; ++i) ddt[i] *= slope[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums.dbias[i] += ddt[i];
  store_bits(to.du, s.du, du, at);
  store_bits(to.ddt, s.ddt, ddt, at);
  if (!s.z) return;
  const Row v = load_row(m.v[t], at);
  Row dz = load_row(m.dz[t], at);
#pragma unroll
  for (int i = 0; i < 8; ++i) dz[i] *= fmaf(D[i], u[i], v[i]);
  store_bits(to.dz, s.dz, dz, at);
}

// dD and ddt_bias of the segment: what the threads of each token have, added up.
__device__ __forceinline__ void sum_weights(Shared& m, const Gradients& sums, const Place& at) {
  __syncthreads();   // the last span is read
  store_row(m.delta[at.token], sums.dD, at);
  store_row(m.du[at.token], sums.dbias, at);
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= at.channels) return;
  float dD = 0.f, dbias = 0.f;
  for (int t = 0; t < kSpan; ++t) dD += m.delta[t][i], dbias += m.du[t][i];
  const int64_t to = (at.row * at.w.segments + at.segment) * at.s.dim + at.first + i;
  at.w.dD[to] = dD;
  at.w.dbias[to] = dbias;
}

}  // namespace
}  // namespace pyseq
