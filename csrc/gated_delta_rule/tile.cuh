// What the fused form has of a chunk of 16 tokens in shared memory: three stages of q, k and v as they came, and two of
// what one warp works out from them, a chunk ahead of the others:
//
//   E[i, j] = exp(g[j+1] + ... + g[i]), j <= i     each sum by itself: it keeps its digits however fast a head forgets
//   Aqk     = scale (Q K^T) o E                               in two parts of bfloat16
//   T       = (I + beta (K K^T) o E, below the diagonal)^-1   in three
#pragma once
#include "cuda/async.cuh"
#include "cuda/opaque.cuh"
#include "cuda/operands.cuh"
#include "gated_delta_rule/forward.cuh"

namespace pyseq {
namespace {

using Bf16 = __nv_bfloat16;
using Halves = Matrix<const Bf16>;

constexpr int kStages = 3, kUnit = 8;                  // elements of one copy
constexpr int kColumnWarps = 4, kColumnsOfBlock = 16 * kColumnWarps, kVStride = kColumnsOfBlock + kUnit;
constexpr int kSmallStride = 16 + kUnit, kScoreStride = 17;

// K rounded up to 16 KT keys.
template <int KT> struct Stage {
  static constexpr int kStride = 16 * KT + kUnit;
  alignas(16) Bf16 q[kC * kStride], k[kC * kStride], v[kC * kVStride];
};

// A number as a sum of numbers of bfloat16, the largest first: two have 16 bits, three 24, as many as float32.
template <int n> struct InParts {
  Parts::A part[n];

  __device__ __forceinline__ explicit InParts(const Result& d) {
    Result rest;
#pragma unroll
    for (int i = 0; i < 8; ++i) rest[i / 4][i % 4] = d[i / 4][i % 4];
#pragma unroll
    for (int p = 0; p < n; ++p)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const pair = rest[i / 2] + i % 2 * 2;
        part[p].v[i] = pack_bf16(pair[0], pair[1]);
        pair[0] -= low_of(part[p].v[i]);
        pair[1] -= high_of(part[p].v[i]);
      }
  }
  // d += A B of the first m parts.
  template <int m = n> __device__ __forceinline__ void multiply(Result& d, const Parts::B& b) const {
#pragma unroll
    for (int p = m - 1; p >= 0; --p) Parts::multiply(d, part[p], b);
  }
};

struct Factors {
  alignas(16) Bf16 Aqk[2][kC * kSmallStride], T[3][kC * kSmallStride];
  float in[kC], out[kC], beta[kC];   // in[i] = exp(g[0] + ... + g[i]), out[i] = E[15, i]
  float scale[kC], last;             // of y, of S: NaN from the first g on that is not <= 0, which else is taken as 0
};

template <int KT> struct Memory {
  Stage<KT> stage[kStages];
  Factors factors[2];
  float E[kC * kScoreStride], N[kC * kScoreStride];
};

// The warp that brings chunks in and works out their factors.
template <int KT> struct Producer {
  const GatedDeltaRule& s;
  Memory<KT>& m;
  Span span;
  int head, shared, first, lane;

  __device__ __forceinline__ const Bf16* row(const View& x, int head, int t) const {
    return static_cast<const Bf16*>(x.data) + span.row * x.stride[0] + t * x.stride[1] + head * x.stride[2];
  }
  template <int kUnits>
  __device__ __forceinline__ void fetch_rows(const View& x, int head, int t, int from, int width, Bf16* to,
                                             int stride) const {
    constexpr int kEach = kC * kUnits / 32;
    const int lane = opaque(this->lane);   // what follows from it is not kept from chunk to chunk: registers are few
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int i = n * 32 + lane, token = i / kUnits, column = i % kUnits * kUnit;
      const bool there = t + token < span.end && from + column < width;
      const Bf16* const p = there ? row(x, head, t + token) + from + column : static_cast<const Bf16*>(x.data);
      cp_async<16>(to + token * stride + column, p, there ? 16 : 0);
    }
  }
  __device__ __forceinline__ void fetch(int t) const {
    if (t < span.end) {
      Stage<KT>& to = m.stage[(t - span.begin) / kC % kStages];
      fetch_rows<2 * KT>(s.q, shared, t, 0, int(s.keys), to.q, Stage<KT>::kStride);
      fetch_rows<2 * KT>(s.k, shared, t, 0, int(s.keys), to.k, Stage<KT>::kStride);
      fetch_rows<kColumnsOfBlock / kUnit>(s.v, head, t, first, int(s.values), to.v, kVStride);
    }
    cp_async_commit();
  }
  // Of the token of this lane, log2 of the decay and beta.
  __device__ __forceinline__ float2 fetch_token(int t) const {
    const int token = t + lane;
    if (lane >= kC || token >= span.end) return {0.f, 0.f};
    float l = 0.f;
    if (s.g) {
      const float g = load(s.g, span.row * s.g.stride[0] + token * s.g.stride[1] + head);
      l = g <= 0.f ? g * kLog2e : not_a_number();
    }
    return {l, load(s.beta, span.row * s.beta.stride[0] + token * s.beta.stride[1] + head)};
  }

  // Lane j has column j of E, lane 16 in.
  __device__ __forceinline__ void decays(Factors& f, float2 token) const {
    const int j = lane == kC ? -1 : lane;
    const unsigned wrong = __ballot_sync(~0u, token.x != token.x);
    const float l_here = token.x == token.x ? token.x : 0.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      const float l = __shfl_sync(~0u, l_here, i);
      if (i > j) sum += l;
      const float e = i >= j ? ex2(sum) : 0.f;
      if (lane < kC) m.E[i * kScoreStride + lane] = e;
      if (lane == kC) f.in[i] = e;
      if (i < kC - 1) continue;
      if (lane < kC) f.out[lane] = e;
      if (lane == kC) f.last = wrong ? not_a_number() : e;
    }
    if (lane >= kC) return;
    f.beta[lane] = token.y;
    f.scale[lane] = wrong << (31 - lane) ? not_a_number() : s.scale;   // at or before this token
  }
  static __device__ __forceinline__ void split(Bf16* hi, Bf16* lo, float low, float high) {
    const unsigned both = pack_bf16(low, high);
    *reinterpret_cast<unsigned*>(hi) = both;
    *reinterpret_cast<unsigned*>(lo) = pack_bf16(low - low_of(both), high - high_of(both));
  }
  __device__ __forceinline__ void work_out(int t, float2 token) const {
    const int chunk = (t - span.begin) / kC;
    const Stage<KT>& from = m.stage[chunk % kStages];
    Factors& f = m.factors[chunk % 2];
    decays(f, token);
    __syncwarp();
    Result qk{}, kk{};
#pragma unroll
    for (int n = 0; n < KT; ++n) {
      constexpr int kStride = Stage<KT>::kStride;
      const auto k = Parts::load_b<true>(Halves{from.k + 16 * n, kStride}, lane);
      Parts::multiply(qk, Parts::load_a<false>(Halves{from.q + 16 * n, kStride}, lane), k);
      Parts::multiply(kk, Parts::load_a<false>(Halves{from.k + 16 * n, kStride}, lane), k);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = lane / 4 + n % 2 * 8, j = n / 2 * 8 + lane % 4 * 2;
      const float* const e = m.E + i * kScoreStride + j;
      const float *const q = qk[n / 2] + n % 2 * 2, *const k = kk[n / 2] + n % 2 * 2;
      const int to = i * kSmallStride + j;
      split(f.Aqk[0] + to, f.Aqk[1] + to, i >= j ? s.scale * q[0] * e[0] : 0.f, i > j ? s.scale * q[1] * e[1] : 0.f);
      const float beta = f.beta[i];
      m.N[i * kScoreStride + j] = i > j ? beta * k[0] * e[0] : 0.f;
      m.N[i * kScoreStride + j + 1] = i > j + 1 ? beta * k[1] * e[1] : 0.f;
    }
    __syncwarp();
    invert(f);
  }
  // A lane to a column of T, from the top.
  __device__ __forceinline__ void invert(Factors& f) const {
    const int lane = opaque(this->lane);
    if (lane >= kC) return;
    float x[kC];
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      float even = i == lane ? 1.f : 0.f, odd = 0.f;
#pragma unroll
      for (int j = 0; j < i; ++j) (j % 2 ? odd : even) -= m.N[i * kScoreStride + j] * x[j];
      x[i] = even + odd;
      float rest = x[i];
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const Bf16 part = __float2bfloat16_rn(rest);
        f.T[p][i * kSmallStride + lane] = part;
        rest -= __bfloat162float(part);
      }
    }
  }
};

}  // namespace
}  // namespace pyseq
