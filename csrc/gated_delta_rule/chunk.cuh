// A chunk of 16 tokens in shared memory, in float32, for a block that has some columns of the state of one head.
//
// With a[i] the decay of token i, in[i] = a[0] ... a[i] and out[i] = a[i+1] ... a[15], for each key:
//
//   scores    Aqk[i, j] = scale sum_d q[i,d] k[j,d] (a[j+1] ... a[i]), j <= i;   kk[i, j] the same of k and k, j < i
//   factors   Qr = scale q in, Kr = k in, Kw = k out
//   M         (I + kk diag(beta))^-1
//
// so that e = M (V - Kr S), U = beta e and S' = in[15] S + Kw^T U. Nothing is divided by a product of decays.
// Tokens that are not there have k = q = v = beta = 0 and a = 1, which changes nothing.
#pragma once
#include "cuda/operands.cuh"
#include "gated_delta_rule/forward.cuh"

namespace pyseq {
namespace {

constexpr int kChunkWarps = 8, kChunkThreads = 32 * kChunkWarps;
constexpr int kSmall = 17;   // from row to row of a matrix of 16 by 16

// Where things are in shared memory, in floats.
struct Layout {
  int keys, key_stride, columns, column_stride;   // K and the columns of a block, in multiples of 16
  int parts;                                      // blocks of a head
  int H, G, Q, K, A, D, O, Z, E, Aqk, kk, M, P, last, more, tokens, floats;
};

inline Layout layout(const GatedDeltaRule& s, int columns) {
  Layout at{};
  at.keys = int(s.keys + 15) / 16 * 16;
  at.key_stride = at.keys + 4;
  at.columns = columns;
  at.column_stride = columns + (columns > 16 ? 4 : 2);
  at.parts = int((s.values + columns - 1) / columns);
  const auto take = [&](int floats) {
    const int begin = at.floats;
    at.floats += (floats + 3) / 4 * 4;
    return begin;
  };
  for (int* states : {&at.H, &at.G}) *states = take(at.keys * at.column_stride);
  for (int* rows : {&at.Q, &at.K, &at.A}) *rows = take(kC * at.key_stride);
  for (int* rows : {&at.D, &at.O, &at.Z, &at.E}) *rows = take(kC * at.column_stride);
  for (int* small : {&at.Aqk, &at.kk, &at.M, &at.P}) *small = take(kC * kSmall);
  for (int* row : {&at.last, &at.more}) *row = take(at.keys);
  at.tokens = take(kC * (2 + kChunkWarps));   // beta; <du, e>; by warp, parts of dg
  return at;
}

// The most columns whose block fits the device.
inline Layout layout(const GatedDeltaRule& s) {
  int columns = 128;
  while (columns > 16 && (columns - 16 >= s.values || layout(s, columns).floats * sizeof(float) > shared_limit()))
    columns /= 2;
  return layout(s, columns);
}

struct Wide {   // which rows may be read 4 elements at a time
  bool q, k, g, v, dy;
};
inline Wide wide(const GatedDeltaRule& s) {
  const auto four = [](const View& x) { return x && vectorisable(x, 4, 3); };
  return {four(s.q), four(s.k), !s.one_decay && four(s.g), four(s.v), four(s.dy)};
}

using Floats = Matrix<const float>;

// d += A B over `depth` terms, 16 at a time.
template <bool transpose_a, bool transpose_b>
__device__ __forceinline__ void add_product(Result& d, Floats a, Floats b, int depth, int lane) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    Full::multiply(d, Full::load_a<transpose_a>(a, lane), Full::load_b<transpose_b>(b, lane));
    a.at += transpose_a ? 16 * a.stride : 16;
    b.at += transpose_b ? 16 : 16 * b.stride;
  }
}

// f(row, column, element) for all that the lane has of a product.
template <class Function> __device__ __forceinline__ void each(Result& d, int lane, const Function& f) {
#pragma unroll
  for (int i = 0; i < 8; ++i) f(lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2, d[i / 4][i % 4]);
}

struct Chunk {
  const GatedDeltaRule& s;
  const Layout& at;
  const Wide& wide;
  float* memory;
  Span span;
  int head, first;   // the value head, the block's first column
  int lane, warp;

  __device__ __forceinline__ float* floats(int i) const { return memory + i; }
  __device__ __forceinline__ Floats rows(int i, int column = 0) const {
    return {memory + i + column, at.column_stride};
  }
  __device__ __forceinline__ Floats state(int i, int key, int column) const {
    return {memory + i + key * at.column_stride + column, at.column_stride};
  }
  __device__ __forceinline__ Floats keys(int i, int key = 0) const { return {memory + i + key, at.key_stride}; }
  __device__ __forceinline__ Floats small(int i) const { return {memory + i, kSmall}; }
  __device__ __forceinline__ float beta(int i) const { return memory[at.tokens + i]; }
  __device__ __forceinline__ int shared_head() const { return head / int(s.value_heads / s.heads); }
  __device__ __forceinline__ int left(int t) const { return min(kC, span.end - t); }
  __device__ __forceinline__ int64_t of_head(const View& x, int head, int t) const {
    return span.row * x.stride[0] + t * x.stride[1] + head * x.stride[2];
  }
  __device__ __forceinline__ int64_t token(int t) const { return (span.row * s.time + t) * s.value_heads + head; }

  // 16 rows of `width` numbers at `from`, of which `count` are there, to `to`; f changes them on the way.
  template <class Function>
  __device__ __forceinline__ void stage(const View& x, bool wide, int head, int t, int from, int count, int width,
                                        int to, int stride, const Function& f) const {
    const int fours = width / 4;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kC * fours; i += kChunkThreads) {
      const int token = i / fours, place = i % fours * 4;
      Vec<4> v{};
      if (x && token < left(t))
        v = load_vec<4>(x, of_head(x, head, t + token) + from + place, wide, count - place);
#pragma unroll
      for (int e = 0; e < 4; ++e) memory[to + token * stride + place + e] = f(v[e]);
    }
  }
  __device__ __forceinline__ void stage_columns(const View& x, bool wide, int t, int to) const {
    stage(x, wide, head, t, first, int(s.values) - first, at.columns, to, at.column_stride, [](float v) { return v; });
  }
  template <bool kQueries> __device__ __forceinline__ void stage_keys(int t) const {
    const auto same = [](float v) { return v; };
    const int K = int(s.keys);
    stage(s.k, wide.k, shared_head(), t, 0, K, at.keys, at.K, at.key_stride, same);
    if (kQueries) stage(s.q, wide.q, shared_head(), t, 0, K, at.keys, at.Q, at.key_stride, same);
    if (s.g && !s.one_decay) {
      stage(s.g, wide.g, head, t, 0, K, at.keys, at.A, at.key_stride, [](float v) { return decay_of(v); });
    } else {
#pragma unroll 1
      for (int token = warp; token < kC; token += kChunkWarps) {
        const float a = decay(t, token);
        for (int key = lane; key < at.keys; key += 32) memory[at.A + token * at.key_stride + key] = a;
      }
    }
    if (int(threadIdx.x) < kC) {
      const View& x = s.beta;
      const bool there = int(threadIdx.x) < left(t);
      const int64_t from = span.row * x.stride[0] + (t + int64_t(threadIdx.x)) * x.stride[1] + head;
      memory[at.tokens + threadIdx.x] = there ? load(x, from) : 0.f;
    }
  }
  // Of a token with one decay, or none.
  __device__ __forceinline__ float decay(int t, int token) const {
    const bool there = s.g && token < left(t);
    return there ? decay_of(load(s.g, span.row * s.g.stride[0] + (t + token) * s.g.stride[1] + head)) : 1.f;
  }

  // Scores of token j = threadIdx.x / 16 with all later ones: 16 lanes sum over keys, and are left with one row each.
  template <bool kQueries> __device__ __forceinline__ void scores() const {
    const int j = int(threadIdx.x) / 16, part = lane % 16;
    float qk[kC] = {}, kk[kC] = {};
#pragma unroll 1
    for (int key = part * 4; key < at.keys; key += 64) {
      const Vec<4> own = load_vec<4>(memory + at.K + j * at.key_stride + key);
      Vec<4> w{};
#pragma unroll
      for (int i = 0; i < kC; ++i) {
        const int from = i * at.key_stride + key;
        const Vec<4> a = load_vec<4>(memory + at.A + from), k = load_vec<4>(memory + at.K + from);
        const Vec<4> q = kQueries ? load_vec<4>(memory + at.Q + from) : Vec<4>{};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[e] = i == j ? own[e] : w[e] * a[e];
          kk[i] = fmaf(k[e], w[e], kk[i]);
          if (kQueries) qk[i] = fmaf(q[e], w[e], qk[i]);
        }
      }
    }
    halve(kk, part);
    if (kQueries) halve(qk, part);
    memory[at.kk + part * kSmall + j] = part > j ? kk[0] : 0.f;
    if (kQueries) memory[at.Aqk + part * kSmall + j] = part >= j ? s.scale * qk[0] : 0.f;
  }
  // Sums 16 numbers over 16 lanes: lane i is left with the i-th in x[0].
  static __device__ __forceinline__ void halve(float (&x)[kC], int i) {
#pragma unroll
    for (int level = 0; level < 4; ++level) {
      const int half = kC / 2 >> level;
      const bool upper = i & half;
#pragma unroll
      for (int n = 0; n < kC / 2; ++n) {
        if (n >= half) continue;
        const float give = upper ? x[n] : x[n + half], keep = upper ? x[n + half] : x[n];
        x[n] = keep + __shfl_xor_sync(~0u, give, half);
      }
    }
  }

  // k, q and decays become Kr, Qr and Kw.
  template <bool kQueries> __device__ __forceinline__ void factors() const {
    const int key = int(threadIdx.x);
    if (key >= at.keys) return;
    float* const k = memory + at.K + key;
    float* const a = memory + at.A + key;
    float* const q = memory + at.Q + key;
    float in = 1.f, out = 1.f, own[kC], decays[kC];
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      own[i] = k[i * at.key_stride];
      decays[i] = a[i * at.key_stride];
      in *= decays[i];
      k[i * at.key_stride] = own[i] * in;
      if (kQueries) q[i * at.key_stride] *= s.scale * in;
    }
    memory[at.last + key] = in;
#pragma unroll
    for (int i = kC - 1; i >= 0; --i) {
      a[i * at.key_stride] = own[i] * out;
      out *= decays[i];
    }
  }

  // M by one warp, a lane to a column; diag(beta) M where `scaled`.
  __device__ __forceinline__ void invert(bool scaled) const {
    if (lane >= kC) return;
    float m[kC];
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      float x = i == lane ? 1.f : 0.f;
#pragma unroll
      for (int j = 0; j < i; ++j) x = fmaf(-memory[at.kk + i * kSmall + j], beta(j) * m[j], x);
      m[i] = x;
    }
#pragma unroll
    for (int i = 0; i < kC; ++i) memory[at.M + i * kSmall + lane] = scaled ? beta(i) * m[i] : m[i];
  }

  // S = in[15] S + Kw^T U, U = beta e. The sum of 16 tokens is added in float32, which rounds to nearest.
  __device__ __forceinline__ void advance_state() const {
    const int across = at.columns / 16;
#pragma unroll 1
    for (int i = warp; i < at.keys / 16 * across; i += kChunkWarps) {
      const int key = i / across * 16, column = i % across * 16;
      Result d{};
      const auto b = rows(at.E, column);
      Full::A a = Full::load_a<true>(keys(at.A, key), lane);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int r = 0; r < 4; ++r) a.v[k][r] *= beta(8 * k + lane % 4 * 2 + r / 2);
      Full::multiply(d, a, Full::load_b<false>(b, lane));
      each(d, lane, [&](int row, int c, float x) {
        float& h = memory[at.H + (key + row) * at.column_stride + column + c];
        h = fmaf(memory[at.last + key + row], h, x);
      });
    }
  }

  // From [K, V] of the head; zeros beyond its edges and where there is none.
  __device__ __forceinline__ void load_state(int to, const float* from) const {
    const int fours = at.columns / 4, V = int(s.values);
    const bool aligned = from && V % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < at.keys * fours; i += kChunkThreads) {
      const int key = i / fours, column = i % fours * 4;
      const int count = from && key < int(s.keys) ? within(4, V - first - column) : 0;
      const View x{const_cast<float*>(from), DType::f32, {}};
      Vec<4> v{};
      if (count > 0) v = load_vec<4>(x, int64_t(key) * V + first + column, aligned, count);
#pragma unroll
      for (int e = 0; e < 4; ++e) memory[to + key * at.column_stride + column + e] = v[e];
    }
  }
};

}  // namespace
}  // namespace pyseq
