// From the gradients of a chunk's products to those of its tokens: dq, dk, dg, dbeta.
//
// g[s] is in every decay from before s to after it. Its gradient adds up what has such a decay as a factor: pairs of
// tokens j < s <= i, the state before with tokens i >= s, tokens j < s with the state behind, both states with each
// other. No sum is the difference of larger ones.
#pragma once
#include "gated_delta_rule/backward_work.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// Where the sums over value heads of this chunk's rows are: chunk `i` of the span.
struct Rows {
  float *dq, *dk;
  Rows(const Work& w, int64_t i) : dq(w.dq + i * kTokens * w.width), dk(w.dk + i * kTokens * w.width) {}
};

inline void store_number(const View& to, int64_t at, float v) { store(to, at, splat(v), 1); }

// Gradients of <k[i], k[j]> and <q[i], k[j]> in place of those of N / beta and Aqk.
template <Gate gate> inline void weigh_pairs(const GatedDeltaRule& s, const Chunk& c, float* dkk, float* dqk) {
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kTokens; ++j) {
      const int at = i * kTokens + j;
      const float between = gate == Gate::one ? c.between[at] : 1.f;
      dkk[at] = j < i ? dkk[at] * between : 0.f;
      dqk[at] = j <= i ? dqk[at] * s.scale * between : 0.f;
    }
  }
}

// dq and dk where a pair of tokens has one decay.
template <Gate gate>
inline void add_rows(const GatedDeltaRule& s, const Chunk& c, const Work& w, const float* dkk, const float* dqk,
                     const Rows& to) {
  const int64_t width = c.width;
  for (int64_t token = 0; token < kTokens; token += 4) {
    for_columns<4>(token, width, [&]<int R, int C>(int64_t i, int64_t n) {
      const int64_t later = i + R, behind = kTokens - later;
      vf dq[R][C] = {}, dk[R][C] = {};
      multiply(dq, dqk + i * kTokens, kTokens, 1, c.k + n, width, i);
      multiply_lower(dq, dqk + i * kTokens + i, kTokens, 1, c.k + i * width + n, width);
      multiply(dk, dkk + i * kTokens, kTokens, 1, c.k + n, width, i);
      multiply_lower(dk, dkk + i * kTokens + i, kTokens, 1, c.k + i * width + n, width);
      multiply_upper(dk, dkk + i * kTokens + i, 1, kTokens, c.k + i * width + n, width);
      multiply(dk, dkk + later * kTokens + i, 1, kTokens, c.k + later * width + n, width, behind);
      multiply_upper(dk, dqk + i * kTokens + i, 1, kTokens, c.q + i * width + n, width);
      multiply(dk, dqk + later * kTokens + i, 1, kTokens, c.q + later * width + n, width, behind);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf before = splat(gate == Gate::one ? c.before[i + r] : 1.f);
        const vf after = splat(gate == Gate::one ? c.after[i + r] : 1.f);
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) {
          const int64_t at = (i + r) * width + n + v * W;
          const vf from_q = load(w.dbefore_q + at) * s.scale * before + dq[r][v];
          const vf from_k = fma(load(w.dafter + at), after, fma(load(w.dbefore_k + at), before, dk[r][v]));
          store(to.dq + at, load(to.dq + at) + from_q);
          store(to.dk + at, load(to.dk + at) + from_k);
        }
      }
    });
  }
}

// dg with one decay per head. dN and dA: the gradients of N / beta and Aqk.
inline void add_gate(const Chunk& c, const Work& w, const float* dN, const float* dA, float* dg) {
  float reach[kTokens] = {}, behind[kTokens], before[kTokens];
  vf held = {};
  for (int64_t i = 0; i < c.width; ++i) held += load(w.held + i * W);
  const float whole = c.before[kTokens - 1] * sum(held);
  for (int i = 0; i < kTokens; ++i) {
    vf total_before = {}, total_after = {};
    for (int64_t at = i * c.width; at < (i + 1) * c.width; at += W) {
      total_before = fma(load(w.dbefore_q + at), load(c.q_before + at), total_before);
      total_before = fma(load(w.dbefore_k + at), load(c.k_before + at), total_before);
      total_after = fma(load(w.dafter + at), load(c.k_after + at), total_after);
    }
    before[i] = sum(total_before);
    behind[i] = sum(total_after);
  }
  for (int i = kTokens - 2; i >= 0; --i) before[i] += before[i + 1];
  float after = 0.f;
  for (int t = 0; t < kTokens; ++t) {   // reach[i]: the sum over j < t of the pairs (i, j)
    float pairs = 0.f;
    for (int i = t; i < kTokens; ++i) {
      const int at = i * kTokens + t - 1;
      if (t > 0) reach[i] += dA[at] * c.qk[at] - dN[at] * c.kk[at];
      pairs += reach[i];
    }
    dg[t] = pairs + before[t] + after + whole;
    after += behind[t];
  }
}

// All of it per key, W keys from n. x[i] is k[j] decayed to token i, Z what reaches back to token i from those behind.
inline void add_keys(const GatedDeltaRule& s, const Chunk& c, const Work& w, const float* dkk, const float* dqk,
                     const Rows& to, int64_t n) {
  vf dq[kTokens] = {}, dk[kTokens] = {}, dg[kTokens] = {}, x[kTokens];
  const auto at = [&](const float* rows, int64_t i) { return load(rows + i * c.width + n); };
  for (int j = 0; j < kTokens; ++j) {
    x[j] = at(c.k, j);
    dq[j] = fma(x[j], dqk[j * kTokens + j], dq[j]);
    for (int i = j + 1; i < kTokens; ++i) {
      x[i] = x[i - 1] * at(c.w, i);
      dq[i] = fma(x[i], dqk[i * kTokens + j], dq[i]);
      dk[i] = fma(x[i], dkk[i * kTokens + j], dk[i]);
    }
    vf Z = {};
    for (int i = kTokens - 1; i > j; --i) {
      Z = fma(at(c.k, i), dkk[i * kTokens + j], fma(at(c.q, i), dqk[i * kTokens + j], Z));
      dg[i] = fma(Z, x[i], dg[i]);
      Z *= at(c.w, i);
    }
    dk[j] += fma(at(c.q, j), dqk[j * kTokens + j], Z);
  }
  const vf whole = at(c.before, kTokens - 1);
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = sum(load(w.held + (n + i) * W));
  vf after = whole * load(lanes), before = {};
  for (int i = 0; i < kTokens; ++i) {
    dg[i] += after;
    after = fma(at(w.dafter, i), at(c.k_after, i), after);
  }
  for (int i = kTokens - 1; i >= 0; --i) {
    before = fma(at(w.dbefore_k, i), at(c.k_before, i), fma(at(w.dbefore_q, i), at(c.q_before, i), before));
    store(w.dg + i * c.width + n, dg[i] + before);
    const vf from_q = at(w.dbefore_q, i) * s.scale * at(c.before, i) + dq[i];
    const vf from_k = fma(at(w.dafter, i), at(c.after, i), fma(at(w.dbefore_k, i), at(c.before, i), dk[i]));
    store(to.dq + i * c.width + n, at(to.dq, i) + from_q);
    store(to.dk + i * c.width + n, at(to.dk, i) + from_k);
  }
}

template <Gate gate>
inline void finish(const GatedDeltaRule& s, const Sequence& seq, const Chunk& c, const Work& w, int64_t head,
                   const Rows& to) {
  float *const dkk = w.dots, *const dqk = w.dots + kTokens * kTokens;
  if constexpr (gate == Gate::one) {
    float dg[kTokens];
    add_gate(c, w, dkk, dqk, dg);
    for (int64_t t = 0; t < c.tokens; ++t) store_number(s.dg, number_at(s.dg, seq, c.begin + t, head), dg[t]);
  }
  weigh_pairs<gate>(s, c, dkk, dqk);
  if constexpr (gate == Gate::per_key) {
    for (int64_t n = 0; n < c.width; n += W) add_keys(s, c, w, dkk, dqk, to, n);
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t at = row_at(s.dg, seq, c.begin + t, head);
      for (int64_t i = 0; i < s.keys; i += W) store(s.dg, at + i, load(w.dg + t * c.width + i), s.keys - i);
    }
  } else {
    add_rows<gate>(s, c, w, dkk, dqk, to);
  }
  for (int64_t t = 0; t < c.tokens; ++t) {
    store_number(s.dbeta, number_at(s.dbeta, seq, c.begin + t, head), sum(load(w.dbeta + t * W)));
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
