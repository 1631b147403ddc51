// How a span of 8 tokens comes into shared memory. A thread brings in channels 4 lane + {0..3} of the tokens warp and
// warp + 4, and keeps their bits until it turns sums into their gradients.
#pragma once
#include "selective_scan/backward.cuh"

namespace pyseq {
namespace {

constexpr int kRounds = kSpan / kWarps;

struct Shared {
  float delta[kSpan][kBlock], du[kSpan][kBlock], dv[kSpan][kBlock];   // du: delta u
  float B[kSpan][kSlice], C[kSpan][kSlice];
  float p[kSpan][4][kThreads][4];   // [token, channel, thread, state]; step_back puts S1, S2, dB, dC in the place of p
  float v[kSpan][kBlock];           // <C, h>; with z
  float sums[2][kSpan][kBlock];     // S1 and S2 of the slices so far; more than one slice
};

// Elements as they lie in memory: a load is not waited for before its bits become floats.
__device__ __forceinline__ unsigned load_bits(const View& x, int64_t i) {
  return x.type == DType::f32 ? static_cast<const unsigned*>(x.data)[i] : static_cast<const unsigned short*>(x.data)[i];
}
__device__ __forceinline__ float as_float(unsigned bits, DType type) {
  if (type == DType::f32) return __uint_as_float(bits);
  if (type == DType::bf16) return __uint_as_float(bits << 16);
  const unsigned short half = static_cast<unsigned short>(bits);
  return load(reinterpret_cast<const __half*>(&half));
}

// Four neighbours; those beyond `count`, and all of an absent tensor, are zero. 16-bit elements lie in x and y.
struct Quad {
  unsigned x, y, z, w;
};
__device__ __forceinline__ Quad load_quad(const View& v, int64_t i, bool vectorised, int count) {
  if (!v || count <= 0) return {};
  if (v.type == DType::f32) {
    const unsigned* const p = static_cast<const unsigned*>(v.data) + i;
    if (!vectorised) return {p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0};
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    return {bits.x, bits.y, bits.z, bits.w};
  }
  const unsigned short* const p = static_cast<const unsigned short*>(v.data) + i;
  if (vectorised) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    return {bits.x, bits.y, 0, 0};
  }
  const unsigned p1 = count > 1 ? p[1] : 0, p2 = count > 2 ? p[2] : 0, p3 = count > 3 ? p[3] : 0;
  return {p[0] | p1 << 16, p2 | p3 << 16, 0, 0};
}
__device__ __forceinline__ Vec<4> floats(const Quad& q, DType type) {
  const bool wide = type == DType::f32;
  return {{as_float(wide ? q.x : q.x & 0xffff, type), as_float(wide ? q.y : q.x >> 16, type),
           as_float(wide ? q.z : q.y & 0xffff, type), as_float(wide ? q.w : q.y >> 16, type)}};
}

__device__ __forceinline__ int64_t offset(const View& x, int64_t t, const Place& at) {
  return at.row * x.stride[0] + t * x.stride[1] + at.first + 4 * at.lane;
}

struct Inputs {
  Quad dt[kRounds], u[kRounds], z[kRounds], dy[kRounds];
  unsigned B, C;   // of one token and state
};

// Without dy and z where the walk is forward only.
__device__ __forceinline__ void load_channels(Inputs& in, const Place& at, int64_t t0, int tokens, bool back) {
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int t = at.warp + k * kWarps, count = t < tokens ? at.channels - 4 * at.lane : 0;
    const auto quad = [&](const View& x) { return load_quad(x, offset(x, t0 + t, at), at.w.vectorised, count); };
    in.dt[k] = quad(at.s.dt);
    in.u[k] = quad(at.s.u);
    if (!back) continue;
    in.z[k] = quad(at.s.z);
    in.dy[k] = quad(at.s.dy);
  }
}
__device__ __forceinline__ void load_shared(Inputs& in, const Place& at, int64_t t0, int tokens, int slice) {
  const int t = threadIdx.x / kSlice;
  const int64_t n = slice * kSlice + threadIdx.x % kSlice;
  const auto element = [&](const View& x) {
    const int64_t i = at.row * x.stride[0] + (t0 + t) * x.stride[1] + at.group * x.stride[2] + n;
    return t < tokens && n < at.s.states ? load_bits(x, i) : 0u;
  };
  in.B = element(at.s.B);
  in.C = element(at.s.C);
}

// D and dt_bias of the thread's channels, and their gradients over its tokens.
struct Weights {
  Vec<4> D, bias, dD, dbias;

  __device__ explicit Weights(const Place& at) : dD{}, dbias{} {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool exists = 4 * at.lane + c < at.channels;
      D[c] = at.s.D && exists ? at.s.D[at.first + 4 * at.lane + c] : 0.f;
      bias[c] = at.s.dt_bias && exists ? at.s.dt_bias[at.first + 4 * at.lane + c] : 0.f;
    }
  }
};

// delta, delta u and, on the way back, dv = dy silu(z).
__device__ __forceinline__ void stage_channels(Shared& m, const Inputs& in, const Weights& weights, const Place& at,
                                               bool back) {
  const SelectiveScan& s = at.s;
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
__device__ __forceinline__ void stage_shared(Shared& m, const Inputs& in, const Place& at) {
  const int t = threadIdx.x / kSlice, n = threadIdx.x % kSlice;
  m.B[t][n] = as_float(in.B, at.s.B.type);
  m.C[t][n] = as_float(in.C, at.s.C.type);
}

}  // namespace
}  // namespace pyseq
