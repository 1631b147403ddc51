// A chunk of kTokens tokens of a head: its operands for the products with states, and the products of its tokens
// among each other. Tokens and keys that are not there are zeros, of decay 1, which change nothing.
#pragma once
#include "gated_delta_rule/unit.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kTokens = 16;   // divides kGatedDeltaKeep

constexpr int kRows = W == 16 ? 8 : 4;   // of a tile kPanelVectors wide; divides kTokens and padded_keys
static_assert(kPanelVectors == 2);

using Tile = vf[kRows][kPanelVectors];

struct Chunk {
  int64_t width;            // of a row: padded_keys
  float *k, *q;             // [kTokens, width]
  float *k_before, *q_before, *k_after;   // k exp(gi), scale q exp(gi), k exp(gl - gi)
  float *before, *after;    // exp(gi), exp(gl - gi): [kTokens, width] per key, [kTokens] with one decay
  float *w;                 // exp(g): [kTokens, width] per key
  float *between;           // exp(gi[i] - gi[j]), j <= i: [kTokens, kTokens] with one decay, zeros above
  float *by;                // of the whole chunk, see Decay: [width]
  int32_t* whole;
  float *beta;              // [kTokens]
  float *kk, *qk;           // [kTokens, kTokens]: -N without beta, and Aqk
  int64_t begin, tokens;

  Chunk(const GatedDeltaRule& s, Scratch& from) : width(padded_keys(s.keys)) {
    const int64_t rows = kTokens * width, per_key = gate_of(s) == Gate::per_key ? rows : kTokens;
    k = from.take(rows);
    q = from.take(rows);
    q_before = from.take(rows);
    k_before = gate_of(s) == Gate::none ? k : from.take(rows);
    k_after = gate_of(s) == Gate::none ? k : from.take(rows);
    before = from.take(per_key);
    after = from.take(per_key);
    w = from.take(per_key);
    between = from.take(kTokens * kTokens);
    by = from.take(width);
    whole = reinterpret_cast<int32_t*>(from.take(width));
    beta = from.take(kTokens);
    kk = from.take(kTokens * kTokens);
    qk = from.take(kTokens * kTokens);
  }
};

inline void put(int32_t* to, vi v) { std::memcpy(to, &v, sizeof v); }

// exp of the sums of g between two tokens, up to a token, after one, and of all: added up, not subtracted.
inline void weigh(const Chunk& c, const float* g) {
  alignas(64) float sums[kTokens + 1][kTokens];   // the last row: up to a token
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kTokens; ++j) {
      sums[i][j] = j > i ? -INFINITY : j == i ? 0.f : sums[i - 1][j] + g[i];
    }
    sums[kTokens][i] = (i ? sums[kTokens][i - 1] : 0.f) + g[i];
  }
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kTokens; j += W) store(c.between + i * kTokens + j, exp(load(sums[i] + j)));
  }
  for (int j = 0; j < kTokens; j += W) {
    store(c.before + j, exp(load(sums[kTokens] + j)));
    store(c.after + j, load(c.between + (kTokens - 1) * kTokens + j));
  }
  const Decay d = decay_of(splat(sums[kTokens][kTokens - 1]));
  for (int64_t i = 0; i < c.width; i += W) store(c.by + i, d.by), put(c.whole + i, d.whole);
}

// The same per key, W keys from i, by products of the decays: a row of g is `stride` elements from the last.
inline void weigh_keys(const Chunk& c, const View& g, int64_t at, int64_t i, int64_t keys) {
  vf sum = {}, product = splat(1.f);
  for (int64_t t = 0; t < kTokens; ++t) {
    const vf log = t < c.tokens && i < keys ? checked_gate(load(g, at + t * g.stride[1] + i, keys - i)) : vf{};
    const vf w = exp(log);
    sum += log;
    product *= w;
    store(c.w + t * c.width + i, w);
    store(c.before + t * c.width + i, product);
  }
  product = splat(1.f);
  for (int64_t t = kTokens - 1; t >= 0; --t) {
    store(c.after + t * c.width + i, product);
    product *= load(c.w + t * c.width + i);
  }
  const Decay d = decay_of(sum);
  store(c.by + i, d.by);
  put(c.whole + i, d.whole);
}

template <Gate gate> inline void load_chunk(const GatedDeltaRule& s, const Sequence& seq, Chunk& c, int64_t head) {
  const int64_t shared = head / (s.value_heads / s.heads);
  if constexpr (gate == Gate::one) {
    alignas(64) float g[kTokens] = {};
    for (int64_t t = 0; t < c.tokens; ++t) {
      g[t] = checked_gate(splat(load(s.g, number_at(s.g, seq, c.begin + t, head), 1)[0]))[0];
    }
    weigh(c, g);
  }
  if constexpr (gate == Gate::per_key) {
    const int64_t at = row_at(s.g, seq, c.begin, head);
    for (int64_t i = 0; i < c.width; i += W) weigh_keys(c, s.g, at, i, s.keys);
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    const bool there = t < c.tokens;
    c.beta[t] = there ? load(s.beta, number_at(s.beta, seq, c.begin + t, head), 1)[0] : 0.f;
    const int64_t k_at = row_at(s.k, seq, c.begin + t, shared), q_at = row_at(s.q, seq, c.begin + t, shared);
    for (int64_t i = 0; i < c.width; i += W) {
      const int64_t at = t * c.width + i, left = s.keys - i;
      const vf k = there && left > 0 ? load(s.k, k_at + i, left) : vf{};
      const vf q = there && left > 0 ? load(s.q, q_at + i, left) : vf{};
      store(c.k + at, k);
      store(c.q + at, q);
      if constexpr (gate == Gate::none) {
        store(c.q_before + at, q * s.scale);
      } else {
        const vf before = gate == Gate::one ? splat(c.before[t]) : load(c.before + at);
        store(c.q_before + at, q * s.scale * before);
        store(c.k_before + at, k * before);
        store(c.k_after + at, k * (gate == Gate::one ? splat(c.after[t]) : load(c.after + at)));
      }
    }
  }
}

// Brings rows of a tensor towards the core: they lie too far apart for the machine to see them coming.
template <int write>
inline void prefetch(const View& x, const Sequence& q, int64_t begin, int64_t head, int64_t columns) {
  for (int64_t t = begin; t < std::min(begin + kTokens, q.end); ++t) {
    const char* const row = static_cast<const char*>(x.at(row_at(x, q, t, head)));
    for (int64_t i = 0; i < columns * size_of(x.type); i += 64) __builtin_prefetch(row + i, write, 2);
  }
}

constexpr int kPairs = W == 16 ? 8 : 4;   // earlier tokens at a time: two sums of each stay in registers

// to[i] = the sum over the lanes of v[i]
inline void sums_of(float* to, const vf (&v)[2 * kPairs]) {
  for (int i = 0; i < 2 * kPairs; i += W) {
    vf parts[W / 4];
#pragma GCC unroll 4
    for (int p = i; p < i + W; p += 4) parts[(p - i) / 4] = sum4(v[p], v[p + 1], v[p + 2], v[p + 3]);
    store(to + i, sum_parts(parts));
  }
}

// sums = [<x[j], k[i]>, <x[j], q[i]>] for tokens [j, j + kPairs); per key, x[j] = k[j] decayed up to token i - 1 is
// first decayed to token i. Of tokens behind i the sums mean nothing.
template <Gate gate>
inline void row_products(const Chunk& c, float* x, int64_t i, int64_t j, float* sums) {
  vf sum[2 * kPairs] = {};
  for (int64_t n = 0; n < c.width; n += W) {
    const vf k = load(c.k + i * c.width + n), q = load(c.q + i * c.width + n);
    vf w = {};
    if constexpr (gate == Gate::per_key) w = load(c.w + i * c.width + n);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      float* const at = x + (j + p) * c.width + n;
      vf v = load(at);
      if constexpr (gate == Gate::per_key) {
        if (j + p < i) v *= w, store(at, v);
      }
      sum[p] = fma(v, k, sum[p]);
      sum[kPairs + p] = fma(v, q, sum[kPairs + p]);
    }
  }
  sums_of(sums, sum);
}

// kk and qk. x [kTokens, width] is work per key.
template <Gate gate> inline void multiply_tokens(const GatedDeltaRule& s, const Chunk& c, float* x) {
  if constexpr (gate == Gate::per_key) std::copy_n(c.k, kTokens * c.width, x);
  alignas(64) float sums[2 * kPairs];
  for (int64_t i = 0; i < kTokens; ++i) {
    float *const kk = c.kk + i * kTokens, *const qk = c.qk + i * kTokens;
    for (int64_t j = 0; j < kTokens; j += kPairs) {
      if (j > i || i >= c.tokens) {
        std::fill_n(kk + j, kPairs, 0.f);
        std::fill_n(qk + j, kPairs, 0.f);
        continue;
      }
      row_products<gate>(c, gate == Gate::per_key ? x : c.k, i, j, sums);
      for (int p = 0; p < kPairs; ++p) {
        const float between = gate == Gate::one ? c.between[i * kTokens + j + p] : 1.f;
        kk[j + p] = j + p < i ? -sums[p] * between : 0.f;
        qk[j + p] = j + p <= i ? s.scale * sums[kPairs + p] * between : 0.f;
      }
    }
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
