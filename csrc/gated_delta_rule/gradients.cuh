// The gradients of one chunk, from the state before it, H, and the gradient of the state after it, G; dy in O.
//
//   dU = Aqk^T dO + Kw G                  Z = M^T (beta dU), which is dV
//   P = Z e^T, R = dO e^T                 dbeta[i] = <dU[i], e[i]> - sum_{j > i} kk[j, i] P[j, i]
//   dkk[i, j] = -P[i, j] beta[j]          dAqk[i, j] = R[i, j] beta[j]
//   dQr = dO H^T   dKr = -Z H^T   dKw = beta e G^T
//   G = in[15] G + Qr^T dO - Kr^T Z
//
// and then per key: dq, and dk in two parts, kr of the keys that read and kw of those that write, which decays divide.
#pragma once
#include "gated_delta_rule/backward.cuh"

namespace pyseq {
namespace {

struct Gradients : Chunk {
  const Partials& partial;
  int64_t offset;   // of this block's rows in each partial: rows before it

  // dU into Z; M diag(beta), by the last warp.
  __device__ __forceinline__ void values_written() const {
#pragma unroll 1
    for (int i = warp; i < at.columns / 16; i += kChunkWarps) {
      Result d{};
      add_product<true, false>(d, small(at.Aqk), rows(at.O, 16 * i), kC, lane);
      add_product<false, false>(d, keys(at.A), state(at.G, 0, 16 * i), at.keys, lane);
      each(d, lane, [&](int row, int c, float x) { memory[at.Z + row * at.column_stride + 16 * i + c] = x; });
    }
    if (warp == kChunkWarps - 1) invert(true);
  }
  // Z into D, and to dv.
  __device__ __forceinline__ void values(int t) const {
#pragma unroll 1
    for (int i = warp; i < at.columns / 16; i += kChunkWarps) {
      Result d{};
      add_product<true, false>(d, small(at.M), rows(at.Z, 16 * i), kC, lane);
      each(d, lane, [&](int row, int c, float x) {
        memory[at.D + row * at.column_stride + 16 * i + c] = x;
        const int column = first + 16 * i + c;
        if (row < left(t) && column < int(s.values)) store(s.dv, of_head(s.dv, head, t + row) + column, x);
      });
    }
  }

  // dQr, dKr and dKw of the warp's keys stay in registers until all have read Qr, Kr and Kw.
  struct Keys {
    Result q[2], r[2], w[2];
  };
  __device__ __forceinline__ void of_factors(Keys& d) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int key = 16 * (warp + n * kChunkWarps);
      if (key >= at.keys) continue;
      add_product<false, true>(d.q[n], rows(at.O), state(at.H, key, 0), at.columns, lane);
      add_product<false, true>(d.r[n], rows(at.D), state(at.H, key, 0), at.columns, lane);
      add_product<false, true>(d.w[n], rows(at.E), state(at.G, key, 0), at.columns, lane);
    }
  }
  __device__ __forceinline__ void store_factors(Keys& d) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int key = 16 * (warp + n * kChunkWarps);
      if (key >= at.keys) continue;
      const auto put = [&](Result& d, int to, const auto& f) {
        each(d, lane, [&](int row, int c, float x) { memory[to + row * at.key_stride + key + c] = f(row, x); });
      };
      put(d.q[n], at.Q, [](int, float x) { return x; });
      put(d.r[n], at.K, [](int, float x) { return -x; });
      put(d.w[n], at.A, [&](int row, float x) { return beta(row) * x; });
    }
  }

  // R, masked and weighed, in the place of Aqk; P in that of M; <dU, e>.
  __device__ __forceinline__ void of_scores() const {
    Result d{};
    if (warp == 0) {
      add_product<false, true>(d, rows(at.O), rows(at.E), at.columns, lane);
      each(d, lane, [&](int i, int j, float x) { memory[at.Aqk + i * kSmall + j] = i >= j ? x * beta(j) : 0.f; });
    } else if (warp == 1) {
      add_product<false, true>(d, rows(at.D), rows(at.E), at.columns, lane);
      each(d, lane, [&](int i, int j, float x) { memory[at.M + i * kSmall + j] = x; });
    } else if (warp == 2) {
      add_product<false, true>(d, rows(at.Z), rows(at.E), at.columns, lane);
      each(d, lane, [&](int i, int j, float x) { if (i == j) memory[at.tokens + kC + i] = x; });
    }
  }
  // The sum over the block's columns of H G, for each key.
  __device__ __forceinline__ void of_decay() const {
    const int key = int(threadIdx.x);
    if (key >= at.keys) return;
    const float *h = memory + at.H + key * at.column_stride, *g = memory + at.G + key * at.column_stride;
    float even = 0.f, odd = 0.f;
#pragma unroll 4
    for (int i = 0; i < at.columns; i += 2) {
      const Vec<2> x = load_vec<2>(h + i), y = load_vec<2>(g + i);
      even = fmaf(x[0], y[0], even);
      odd = fmaf(x[1], y[1], odd);
    }
    memory[at.more + key] = even + odd;
  }

  // dkk from P, and dbeta.
  __device__ __forceinline__ void of_tokens(int t) const {
    const int i = int(threadIdx.x) / kC, j = int(threadIdx.x) % kC;
    memory[at.P + i * kSmall + j] = i > j ? -memory[at.M + i * kSmall + j] * beta(j) : 0.f;
    if (int(threadIdx.x) >= left(t)) return;
    float sum = memory[at.tokens + kC + threadIdx.x];
    for (int n = int(threadIdx.x) + 1; n < kC; ++n)
      sum -= memory[at.kk + n * kSmall + threadIdx.x] * memory[at.M + n * kSmall + threadIdx.x];
    partial.beta[offset + token(t + int(threadIdx.x))] = sum;
  }
  __device__ __forceinline__ void advance_gradient() const {
    const int across = at.columns / 16;
#pragma unroll 1
    for (int i = warp; i < at.keys / 16 * across; i += kChunkWarps) {
      const int key = i / across * 16, column = i % across * 16;
      Result more{}, less{};
      add_product<true, false>(more, keys(at.Q, key), rows(at.O, column), kC, lane);
      add_product<true, false>(less, keys(at.K, key), rows(at.D, column), kC, lane);
#pragma unroll
      for (int n = 0; n < 8; ++n) more[n / 4][n % 4] -= less[n / 4][n % 4];
      each(more, lane, [&](int row, int c, float x) {
        float& g = memory[at.G + (key + row) * at.column_stride + column + c];
        g = fmaf(memory[at.last + key + row], g, x);
      });
    }
  }

  // One key of the chunk's tokens, 0 where there is none.
  __device__ __forceinline__ void load_key(float (&x)[kC], const View& from, int head, int t, int key) const {
#pragma unroll
    for (int i = 0; i < kC; ++i)
      x[i] = i < left(t) && key < int(s.keys) ? load(from, of_head(from, head, t + i) + key) : 0.f;
  }
  __device__ __forceinline__ void of_keys(int t) const {
    const int key = int(threadIdx.x);
    float dg[kC] = {};
    if (key < at.keys) gradients_of_key(dg, t, key);
    if (!s.g) return;
    if (!s.one_decay) {
#pragma unroll
      for (int i = 0; i < kC; ++i)
        if (i < left(t) && key < int(s.keys)) partial.g[(offset + token(t + i)) * s.keys + key] = dg[i];
      return;
    }
    halve(dg, lane % kC);   // lanes are left with one token each, of 16 keys
    const float sum = dg[0] + __shfl_xor_sync(~0u, dg[0], kC);
    if (lane < kC) memory[at.tokens + (2 + warp) * kC + lane] = sum;
    __syncthreads();
    if (int(threadIdx.x) >= left(t)) return;
    float total = 0.f;
    for (int w = 0; w < kChunkWarps; ++w) total += memory[at.tokens + (2 + w) * kC + threadIdx.x];
    partial.g[offset + token(t + int(threadIdx.x))] = total;
  }
  // dq, and what k gets as it is read, into the places of dQr and dKr; then what it gets as it is written. To dg of a
  // token comes each product that its decay is a factor of, and nothing that has to leave again: fast decays leave
  // little, which differences of sums over the chunk would lose.
  __device__ __forceinline__ void gradients_of_key(float (&dg)[kC], int t, int key) const {
    float *const dq = memory + at.Q + key, *const dr = memory + at.K + key, *const dw = memory + at.A + key;
    float k[kC], a[kC], q[kC];
    load_key(k, s.k, shared_head(), t, key);
    if (s.g && !s.one_decay) load_key(a, s.g, head, t, key);
#pragma unroll
    for (int i = 0; i < kC; ++i) a[i] = s.g && !s.one_decay ? decay_of(a[i]) : decay(t, i);
    float in = 1.f;
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      in *= a[i];
      const float own = i < left(t) && key < int(s.keys) ? load(s.q, of_head(s.q, shared_head(), t + i) + key) : 0.f;
      float w = 1.f, sum = s.scale * in * dq[i * at.key_stride], read = in * dr[i * at.key_stride], through[kC];
      float before = fmaf(own, sum, k[i] * read);   // products with the state and the tokens before m
#pragma unroll
      for (int j = i; j >= 0; --j) {
        const float kept = w * k[j], qk = s.scale * memory[at.Aqk + i * kSmall + j];
        const float kk = j < i ? memory[at.P + i * kSmall + j] : 0.f;
        sum = fmaf(qk, kept, sum);
        if (j < i) read = fmaf(kk, kept, read);
        through[j] = fmaf(qk, own, kk * k[i]) * kept;
        w *= a[j];
      }
#pragma unroll
      for (int m = 0; m <= i; ++m) {
        dg[m] += before;
        before += through[m];
      }
      dq[i * at.key_stride] = sum;
      dr[i * at.key_stride] = read;
    }
    float out = 1.f;
    load_key(q, s.q, shared_head(), t, key);   // again: registers are few
#pragma unroll
    for (int j = kC - 1; j >= 0; --j) {
      float w = 1.f, written = out * dw[j * at.key_stride];
#pragma unroll
      for (int m = j + 1; m < kC; ++m) dg[m] = fmaf(k[j], written, dg[m]);   // with the state after the chunk
#pragma unroll
      for (int i = j; i < kC; ++i) {
        if (i > j) w *= a[i];
        const float qk = s.scale * memory[at.Aqk + i * kSmall + j] * q[i];
        written = fmaf(i > j ? fmaf(memory[at.P + i * kSmall + j], k[i], qk) : qk, w, written);
      }
      out *= a[j];
      dw[j * at.key_stride] = written;
    }
    const float whole = memory[at.last + key] * memory[at.more + key];
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      dg[i] += whole;
      if (i < left(t) && key < int(s.keys)) {
        const int64_t to = (offset + token(t + i)) * s.keys + key;
        partial.q[to] = dq[i * at.key_stride];
        partial.k[to] = dr[i * at.key_stride] + dw[i * at.key_stride];
      }
    }
  }
};

}  // namespace
}  // namespace pyseq
