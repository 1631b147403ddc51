// The walk through one span of 8 tokens, forward and back, and the sums over its threads.
#pragma once
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
    if (starts >> t & 1) load_start(h, t0 + t, at, slice);
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
        if (kKeep) store_vec<4>(m.p[t][c][threadIdx.x], p);
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
    const Vec<4> p = load_vec<4>(m.p[t][c][threadIdx.x]);
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
  store_vec<4>(m.p[t][0][threadIdx.x], S1);
  store_vec<4>(m.p[t][1][threadIdx.x], S2);
  store_vec<4>(m.p[t][2][threadIdx.x], dB);
  store_vec<4>(m.p[t][3][threadIdx.x], dC);
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
      if (at.s.dstate) store_tile(states_of(at.s.dstate, at.sequence.at(t0 + begin), at), g, at, slice);
      pass_empty(t0 + begin, at, slice);
      if (t0 + begin > 0) load_end(g, t0 + begin, at, slice);
    }
    end = begin;
  }
}

// dB and dC, summed over the 32 threads that share their states. A warp takes the states of one sl; a lane one token,
// one of the two, and the threads of two warps. Neighbouring tokens begin at different threads, off each other's banks.
__device__ __forceinline__ void sum_channels(const Shared& m, const Place& at, int64_t t0, int tokens, int slice) {
  const int t = at.lane % 8, kind = at.lane / 8 % 2, half = at.lane / 16, sl = at.warp;
  Vec<4> sum{};
  if (t < tokens) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const Vec<4> x = load_vec<4>(m.p[t][2 + kind][32 * (2 * half + i / 8) + 8 * sl + (i + t) % 8]);
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] += x[n];
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) sum[n] += __shfl_xor_sync(~0u, sum[n], 16);
  float* const to = at.w.slabs + ((at.unit * at.s.time + t0 + t) * 2 + kind) * at.w.width() + slice * kSlice + 4 * sl;
  if (half == 0 && t < tokens) store_vec<4>(to, sum);
}

// S1 = <B, g> and S2 = <A, r>, summed over the 4 lanes that share their channels; after the last slice du, ddt and dz.
__device__ __forceinline__ void sum_states(Shared& m, const Inputs& in, Weights& weights, const Place& at, int64_t t0,
                                           int tokens, int slice) {
  const SelectiveScan& s = at.s;
  const int count = at.channels - 4 * at.lane, from = at.lane / 8 * 32 + at.lane % 8;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int t = at.warp + k * kWarps;
    if (t >= tokens) break;
    Vec<4> S[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Vec<4> x = load_vec<4>(m.p[t][i / 4][from + i % 4 * 8]);
#pragma unroll
      for (int c = 0; c < 4; ++c) S[i / 4][c] += x[c];
    }
#pragma unroll
    for (int i = 0; at.w.slices > 1 && i < 2; ++i) {
      float* const sum = m.sums[i][t] + 4 * at.lane;
      const Vec<4> before = slice ? load_vec<4>(sum) : Vec<4>{};
#pragma unroll
      for (int c = 0; c < 4; ++c) S[i][c] += before[c];
      store_vec<4>(sum, S[i]);
    }
    if (slice + 1 < at.w.slices) continue;
    const Vec<4> delta = load_vec<4>(m.delta[t] + 4 * at.lane), dv = load_vec<4>(m.dv[t] + 4 * at.lane);
    const Vec<4> u = floats(in.u[k], s.u.type);
    Vec<4> du, ddt;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      du[c] = fmaf(delta[c], S[0][c], weights.D[c] * dv[c]);
      ddt[c] = fmaf(u[c], S[0][c], kLn2 * S[1][c]);   // A carries log2 e
      if (s.dt_softplus) ddt[c] *= softplus_grad(delta[c]);
      weights.dD[c] = fmaf(dv[c], u[c], weights.dD[c]);
      weights.dbias[c] += ddt[c];
    }
    store_vec<4>(s.du, offset(s.du, t0 + t, at), du, at.w.vectorised, count);
    store_vec<4>(s.ddt, offset(s.ddt, t0 + t, at), ddt, at.w.vectorised, count);
    if (!s.z) continue;
    const Vec<4> z = floats(in.z[k], s.z.type), v = load_vec<4>(m.v[t] + 4 * at.lane);
    Vec<4> dz = floats(in.dy[k], s.dy.type);
#pragma unroll
    for (int c = 0; c < 4; ++c) dz[c] *= silu_grad(z[c]) * fmaf(weights.D[c], u[c], v[c]);
    store_vec<4>(s.dz, offset(s.dz, t0 + t, at), dz, at.w.vectorised, count);
  }
}

// dD and ddt_bias of the segment: what the warps have, added up.
__device__ __forceinline__ void sum_weights(Shared& m, const Weights& weights, const Place& at) {
  __syncthreads();   // the last span is read
  store_vec<4>(m.delta[at.warp] + 4 * at.lane, weights.dD);
  store_vec<4>(m.du[at.warp] + 4 * at.lane, weights.dbias);
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= at.channels) return;
  float dD = 0.f, dbias = 0.f;
  for (int warp = 0; warp < kWarps; ++warp) dD += m.delta[warp][i], dbias += m.du[warp][i];
  const int64_t to = (at.row * at.w.segments + at.segment) * at.s.dim + at.first + i;
  at.w.dD[to] = dD;
  at.w.dbias[to] = dbias;
}

}  // namespace
}  // namespace pyseq
