// The parts of the backward that walk through one span of 8 tokens, and the shared memory they meet in.
#pragma once
#include "selective_scan/backward.cuh"

namespace pyseq {
namespace {

constexpr float kLn2 = 0.693147181f;

struct Shared {
  float delta[kSpan][kBlock], du[kSpan][kBlock], dv[kSpan][kBlock];   // du: delta u
  float B[kSpan][kSlice], C[kSpan][kSlice];
  float p[kSpan][4][kThreads][4];   // [token, channel, thread, state]; step_back puts S1, S2, dB, dC in the place of p
  float v[kSpan][kBlock];           // <C, h>; with z
  float sums[2][kSpan][kBlock];     // S1 and S2 of the slices so far; more than one slice
};

// A thread brings in channels 4 lane + {0..3} of every fourth token, and later turns their sums into gradients.
constexpr int kRounds = kSpan / kWarps;

struct Inputs {
  Quad dt[kRounds], u[kRounds], z[kRounds], dy[kRounds];
  unsigned B, C;
};

struct Weights {
  Vec<4> D, bias, dD, dbias;

  __device__ Weights(const SelectiveScan& s, const Place& at) : dD{}, dbias{} {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool exists = 4 * at.lane + c < at.channels;
      D[c] = s.D && exists ? s.D[at.first + 4 * at.lane + c] : 0.f;
      bias[c] = s.dt_bias && exists ? s.dt_bias[at.first + 4 * at.lane + c] : 0.f;
    }
  }
};

__device__ __forceinline__ int64_t offset(const View& x, const Place& at, int64_t t) {
  return at.row * x.stride[0] + t * x.stride[1] + at.first + 4 * at.lane;
}

// Nothing waits for these loads before stage_channels and stage_shared use them.
__device__ __forceinline__ void load_channels(Inputs& in, const SelectiveScan& s, const Workspace& w, const Place& at,
                                              int64_t t0, int tokens, bool back) {
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int t = at.warp + k * kWarps, count = t < tokens ? at.channels - 4 * at.lane : 0;
    const auto quad = [&](const View& x) { return load_quad(x, offset(x, at, t0 + t), w.vectorised, count); };
    in.dt[k] = quad(s.dt);
    in.u[k] = quad(s.u);
    if (!back) continue;
    in.z[k] = quad(s.z);
    in.dy[k] = quad(s.dy);
  }
}
__device__ __forceinline__ void load_shared(Inputs& in, const SelectiveScan& s, const Place& at, int64_t t0, int tokens,
                                            int slice) {
  const int t = threadIdx.x / kSlice;
  const int64_t n = slice * kSlice + threadIdx.x % kSlice;
  const auto element = [&](const View& x) {
    const int64_t i = at.row * x.stride[0] + (t0 + t) * x.stride[1] + at.group * x.stride[2] + n;
    return t < tokens && n < s.states ? load_bits(x, i) : 0u;
  };
  in.B = element(s.B);
  in.C = element(s.C);
}

// delta, delta u and, on the way back, dv = dy silu(z).
__device__ __forceinline__ void stage_channels(Shared& m, const Inputs& in, const Weights& weights, const SelectiveScan& s,
                                               const Place& at, bool back) {
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int t = at.warp + k * kWarps;
    Vec<4> delta = floats(in.dt[k], s.dt.type), du = floats(in.u[k], s.u.type);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      delta[c] += weights.bias[c];
      if (s.dt_softplus) delta[c] = softplus(delta[c]);
      du[c] *= delta[c];
    }
    store_vec<4>(m.delta[t] + 4 * at.lane, delta);
    store_vec<4>(m.du[t] + 4 * at.lane, du);
    if (!back) continue;
    Vec<4> dv = floats(in.dy[k], s.dy.type);
    if (s.z) {
      const Vec<4> z = floats(in.z[k], s.z.type);
#pragma unroll
      for (int c = 0; c < 4; ++c) dv[c] *= silu(z[c]);
    }
    store_vec<4>(m.dv[t] + 4 * at.lane, dv);
  }
}
__device__ __forceinline__ void stage_shared(Shared& m, const Inputs& in, const SelectiveScan& s) {
  const int t = threadIdx.x / kSlice, n = threadIdx.x % kSlice;
  m.B[t][n] = as_float(in.B, s.B.type);
  m.C[t][n] = as_float(in.C, s.C.type);
}

// h through the tokens of a span, from one start of a sequence to the next. A is pre-scaled by log2 e.
template <bool keep>
__device__ __forceinline__ void walk_forward(float (&h)[4][4], const float (&A)[4][4], Shared& m, const SelectiveScan& s,
                                             const Place& at, const Sequences& q, int64_t t0, int tokens, unsigned starts,
                                             int slice) {
#pragma unroll 1
  for (int t = 0; t < tokens;) {
    const int next = __ffs(starts >> t >> 1), end = next ? t + next : tokens;
    if (starts >> t & 1) load_tile(h, s.state ? s.state + q.at(t0 + t) * s.dim * s.states : nullptr, s, at, slice);
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
        if (keep) store_vec<4>(m.p[t][c][threadIdx.x], p);
      }
    }
  }
}

// v of channel 4 quad + sl, from what the four lanes that share the channels have of each.
__device__ __forceinline__ float sum_lanes(const float (&v)[4], int sl) {
  const bool high = sl / 2, odd = sl % 2;
  const float v0 = (high ? v[2] : v[0]) + __shfl_xor_sync(~0u, high ? v[0] : v[2], 16);
  const float v1 = (high ? v[3] : v[1]) + __shfl_xor_sync(~0u, high ? v[1] : v[3], 16);
  return (odd ? v1 : v0) + __shfl_xor_sync(~0u, odd ? v0 : v1, 8);
}

// One token. g arrives as exp(delta A) g of the token behind, and leaves as that of this one.
template <bool gated>
__device__ __forceinline__ void step_back(float (&g)[4][4], float (&dA)[4][4], const float (&A)[4][4], Shared& m,
                                          const Place& at, int t, int slice) {
  const Vec<4> delta = load_vec<4>(m.delta[t] + 4 * at.quad), du = load_vec<4>(m.du[t] + 4 * at.quad);
  const Vec<4> dv = load_vec<4>(m.dv[t] + 4 * at.quad);
  const Vec<4> B = load_vec<4>(m.B[t] + 4 * at.sl), C = load_vec<4>(m.C[t] + 4 * at.sl);
  Vec<4> S1{}, S2{}, dB{}, dC{};
  float v[4] = {};
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
      if (gated) v[c] = fmaf(h, C[n], v[c]);
      g[c][n] = a * g_t;
    }
  }
  store_vec<4>(m.p[t][0][threadIdx.x], S1);
  store_vec<4>(m.p[t][1][threadIdx.x], S2);
  store_vec<4>(m.p[t][2][threadIdx.x], dB);
  store_vec<4>(m.p[t][3][threadIdx.x], dC);
  if (gated) {
    float* const to = &m.v[t][4 * at.quad + at.sl];
    *to = sum_lanes(v, at.sl) + (slice ? *to : 0.f);
  }
}

template <bool gated>
__device__ __forceinline__ void walk_back(float (&g)[4][4], float (&dA)[4][4], const float (&A)[4][4], Shared& m,
                                          const SelectiveScan& s, const Place& at, const Sequences& q, int64_t t0,
                                          int tokens, unsigned starts, int slice) {
#pragma unroll 1
  for (int end = tokens; end > 0;) {
    const unsigned before = starts & ((1u << end) - 1);
    const int begin = before ? 31 - __clz(int(before)) : 0;
#pragma unroll 1
    for (int t = end - 1; t >= begin; --t) step_back<gated>(g, dA, A, m, at, t, slice);
    if (before) {
      if (s.dstate) store_tile(s.dstate + q.at(t0 + begin) * s.dim * s.states, g, s, at, slice);
      pass_empty(q, t0 + begin, s, at, slice);
      if (t0 + begin > 0) load_end(g, q, t0 + begin, s, at, slice);
    }
    end = begin;
  }
}

// dB and dC of the span, summed over the 32 threads that share their states. A warp takes the states of one sl: a lane one
// token, one of the two, and the threads of two warps; neighbouring tokens begin at different threads, off each other's banks.
__device__ __forceinline__ void sum_channels(const Shared& m, const Place& at, float* slab, int64_t width, int64_t t0, int tokens,
                                             int slice) {
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
  if (half == 0 && t < tokens) store_vec<4>(slab + ((t0 + t) * 2 + kind) * width + slice * kSlice + 4 * sl, sum);
}

// S1 = <B, g> and S2 = <A, r>, summed over the 4 lanes that share their channels, and after the last slice what is made of
// them.
__device__ __forceinline__ void sum_states(Shared& m, const Inputs& in, Weights& weights, const SelectiveScan& s,
                                           const Workspace& w, const Place& at, int64_t t0, int tokens, int slice) {
  const int count = at.channels - 4 * at.lane;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int t = at.warp + k * kWarps;
    if (t >= tokens) break;
    Vec<4> S[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Vec<4> x = load_vec<4>(m.p[t][i / 4][at.lane / 8 * 32 + i % 4 * 8 + at.lane % 8]);
#pragma unroll
      for (int c = 0; c < 4; ++c) S[i / 4][c] += x[c];
    }
#pragma unroll
    for (int i = 0; w.slices > 1 && i < 2; ++i) {
      float* const kept = m.sums[i][t] + 4 * at.lane;
      const Vec<4> before = slice ? load_vec<4>(kept) : Vec<4>{};
#pragma unroll
      for (int c = 0; c < 4; ++c) S[i][c] += before[c];
      store_vec<4>(kept, S[i]);
    }
    if (slice + 1 < w.slices) continue;
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
    store_vec<4>(s.du, offset(s.du, at, t0 + t), du, w.vectorised, count);
    store_vec<4>(s.ddt, offset(s.ddt, at, t0 + t), ddt, w.vectorised, count);
    if (!s.z) continue;
    const Vec<4> z = floats(in.z[k], s.z.type), v = load_vec<4>(m.v[t] + 4 * at.lane);
    Vec<4> dz = floats(in.dy[k], s.dy.type);
#pragma unroll
    for (int c = 0; c < 4; ++c) dz[c] *= silu_grad(z[c]) * fmaf(weights.D[c], u[c], v[c]);
    store_vec<4>(s.dz, offset(s.dz, at, t0 + t), dz, w.vectorised, count);
  }
}

// What each warp has of the sums over tokens, added up.
__device__ __forceinline__ void sum_weights(Shared& m, const Weights& weights, const SelectiveScan& s, const Workspace& w,
                                            const Place& at) {
  __syncthreads();   // the last span is read
  store_vec<4>(m.delta[at.warp] + 4 * at.lane, weights.dD);
  store_vec<4>(m.du[at.warp] + 4 * at.lane, weights.dbias);
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= at.channels) return;
  float dD = 0.f, dbias = 0.f;
  for (int warp = 0; warp < kWarps; ++warp) dD += m.delta[warp][i], dbias += m.du[warp][i];
  const int64_t to = (at.row * w.segments + at.segment) * s.dim + at.first + i;
  w.dD[to] = dD;
  w.dbias[to] = dbias;
}

}  // namespace
}  // namespace pyseq
