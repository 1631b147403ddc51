// What of the gradient lies along keys: dq, dk, da, db and dg of a chunk, W keys at a time.
//
// A token reads what one before it wrote through the decays of the tokens between. Let m be a token between the two:
// then the decays fall into those from m to the reader and those from the writer to m, neither above 1, and all pairs
// of the n tokens before m and the n from m on are a product of matrices. With m = 8, then 4 and 12, then 2, 6, 10 and
// 14, then the odd ones, every pair of tokens is met once; the states before and behind the chunk are one more m at
// either end. The gradient of a log decay is the sum of what went through it: of the readers from it on, and of the
// writers before it. Nothing is subtracted, so it is as good as its terms however strong the decays are.
#pragma once
#include "delta_rule/backward_products.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// W keys of a chunk: rows of the chunk, `width` apart, and their gradients.
struct Keys {
  int64_t width;
  const float *decays, *qs, *ks, *as, *bs;
  vf dq[kTokens], dk[kTokens], da[kTokens], db[kTokens], dg[kTokens];

  Keys(const Sizes& z, const Chunk& c, int64_t d)
      : width(z.key_width), decays(c.decay + d), qs(c.q + d), ks(c.k + d), as(z.corrected ? c.a + d : nullptr),
        bs(z.corrected ? c.b + d : nullptr) {}
  vf decay(int64_t t) const { return load(decays + t * width); }
  vf q(int64_t t) const { return load(qs + t * width); }
  vf k(int64_t t) const { return load(ks + t * width); }
  vf a(int64_t t) const { return load(as + t * width); }
  vf b(int64_t t) const { return load(bs + t * width); }
};

// Through the state before the chunk, and through that behind it.
template <bool corrected> void add_states(const Sizes& z, const Gradients& w, int64_t d, Keys& x) {
  const int64_t second = kTokens * z.key_width;   // a behind q, b behind k
  const float *s = w.through_s + d, *g = w.through_g + d;
  vf L = splat(1.f), R = L;
  for (int64_t i = 0; i < kTokens; ++i) {
    if constexpr (corrected) x.da[i] = L * load(s + second + i * z.key_width);
    L *= x.decay(i);
    x.dq[i] = L * load(s + i * z.key_width);
  }
  for (int64_t j = kTokens - 1; j >= 0; --j) {
    x.dk[j] = R * load(g + j * z.key_width);
    if constexpr (corrected) x.db[j] = R * load(g + second + j * z.key_width);
    R *= x.decay(j);
  }
  vf sum = L * load(w.dots + d);   // from state to state
  for (int64_t i = kTokens - 1; i >= 0; --i) {
    sum = fma(x.q(i), x.dq[i], sum);
    x.dg[i] = sum;
    if constexpr (corrected) sum = fma(x.a(i), x.da[i], sum);
  }
  sum = vf{};
  for (int64_t j = 0; j < kTokens; ++j) {
    x.dg[j] += sum;
    sum = fma(x.k(j), x.dk[j], sum);
    if constexpr (corrected) sum = fma(x.b(j), x.db[j], sum);
  }
}

// A token that reads what itself wrote: through no decay.
template <bool corrected> void add_own(const Gradients& w, Keys& x) {
  for (int64_t t = 0; t < kTokens; ++t) {
    const float* const score = w.scores_y + t * w.across + t;
    x.dq[t] = fma(x.k(t), score[0], x.dq[t]);
    x.dk[t] = fma(x.q(t), score[0], x.dk[t]);
    if constexpr (!corrected) continue;
    x.dq[t] = fma(x.b(t), score[kTokens], x.dq[t]);
    x.db[t] = fma(x.q(t), score[kTokens], x.db[t]);
  }
}

// Pairs of the n tokens before m, which write, and the n from m on, which read. The outer loops of the sums are not
// unrolled: the inner ones hold in registers what all share, and the code stays small.
template <bool corrected, int n> [[gnu::noinline]] void add_pairs(const Gradients& w, int m, Keys& x) {
  const int writers = m - n;
  const float *const y = w.scores_y + m * w.across + writers, *const r = corrected ? w.scores_r + (y - w.scores_y) : y;
  vf after[n], before[n + 1];   // from a writer to m; from m to a reader: before[i] without the reader's own decay
  vf k[n], b[n], q[n], a[n];    // so decayed
  vf to_q[n], to_a[n];          // what of dg goes to a reader
  after[n - 1] = before[0] = splat(1.f);
#pragma GCC unroll 8
  for (int j = n - 1; j >= 0; --j) {
    if (j < n - 1) after[j] = after[j + 1] * x.decay(writers + j + 1);
    k[j] = x.k(writers + j) * after[j];
    if constexpr (corrected) b[j] = x.b(writers + j) * after[j];
  }
  for (int i = 0; i < n; ++i) {
    before[i + 1] = before[i] * x.decay(m + i);
    vf dq{}, da{};
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      dq = fma(k[j], y[i * w.across + j], dq);
      if constexpr (!corrected) continue;
      da = fma(k[j], r[i * w.across + j], da);
      dq = fma(b[j], y[i * w.across + j + kTokens], dq);
      da = fma(b[j], r[i * w.across + j + kTokens], da);
    }
    dq *= before[i + 1];
    x.dq[m + i] += dq;
    to_q[i] = x.q(m + i) * dq;
    if constexpr (!corrected) continue;
    da *= before[i];
    x.da[m + i] += da;
    to_a[i] = x.a(m + i) * da;
  }
  vf sum{};
  for (int i = n - 1; i >= 0; --i) {
    sum += to_q[i];
    x.dg[m + i] += sum;
    if constexpr (corrected) sum += to_a[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    q[i] = x.q(m + i) * before[i + 1];
    if constexpr (corrected) a[i] = x.a(m + i) * before[i];
  }
  sum = vf{};
  for (int j = 0; j < n; ++j) {
    vf dk{}, db{};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      dk = fma(q[i], y[i * w.across + j], dk);
      if constexpr (!corrected) continue;
      db = fma(q[i], y[i * w.across + j + kTokens], db);
      dk = fma(a[i], r[i * w.across + j], dk);
      db = fma(a[i], r[i * w.across + j + kTokens], db);
    }
    const int t = writers + j;
    const vf to_m = after[j];
    x.dg[t] += sum;
    dk *= to_m;
    x.dk[t] += dk;
    sum = fma(x.k(t), dk, sum);
    if constexpr (!corrected) continue;
    db *= to_m;
    x.db[t] += db;
    sum = fma(x.b(t), db, sum);
  }
}

template <class T> void write_keys(T* to, int64_t stride, int64_t tokens, int64_t columns, const vf (&rows)[kTokens]) {
  for (int64_t t = 0; t < tokens; ++t) store(to + t * stride, rows[t], columns);
}
inline void write_keys(const View& x, const Place& here, int64_t d, int64_t columns, const vf (&rows)[kTokens]) {
  void* const to = x.at(here.at(x) + d);
  switch (x.type) {
    case DType::bf16: return write_keys(static_cast<bf16*>(to), x.stride[1], here.tokens, columns, rows);
    case DType::f16: return write_keys(static_cast<f16*>(to), x.stride[1], here.tokens, columns, rows);
    default: return write_keys(static_cast<float*>(to), x.stride[1], here.tokens, columns, rows);
  }
}

template <bool corrected>
void gradient_of_keys(const DeltaRule& s, const Sizes& z, const Place& here, const Chunk& c, const Gradients& w) {
  vf sums[kTokens] = {};   // of dg over the keys, where they share a decay
  for (int64_t d = 0; d < z.keys; d += W) {
    Keys x(z, c, d);
    add_states<corrected>(z, w, d, x);
    add_own<corrected>(w, x);
    add_pairs<corrected, 8>(w, 8, x);
    for (int m = 4; m < kTokens; m += 8) add_pairs<corrected, 4>(w, m, x);
    for (int m = 2; m < kTokens; m += 4) add_pairs<corrected, 2>(w, m, x);
    for (int m = 1; m < kTokens; m += 2) add_pairs<corrected, 1>(w, m, x);
    const int64_t columns = z.keys - d;
    write_keys(s.dq, here, d, columns, x.dq);
    write_keys(s.dk, here, d, columns, x.dk);
    if (corrected) write_keys(s.da, here, d, columns, x.da);
    if (corrected) write_keys(s.db, here, d, columns, x.db);
    if (s.dg && !s.one_decay) write_keys(s.dg, here, d, columns, x.dg);
    for (int64_t t = 0; t < kTokens; ++t) sums[t] += x.dg[t];
  }
  for (int64_t t = 0; s.dg && s.one_decay && t < here.tokens; ++t) {
    store(s.dg, here.one_at(s.dg, t), splat(sum(sums[t])), 1);
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
