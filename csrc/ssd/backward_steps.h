// The scores of a chunk, and the gradient of its steps.
#pragma once
#include "ssd/backward_work.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline vi lane_numbers() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// use(i, j, exp(L[i] - L[t]) for the W tokens t from j, t <= i). Decays from further back than
// where the W tokens of i begin are split there into two factors of at most 1; those within are exponentials of
// differences of sums in two floats, high and low.
template <class Use> inline void for_decays(const Decays& d, Use use) {
  const vi lane = lane_numbers();
  alignas(64) float near[W], high[W], low[W];
  for (int64_t i = 0; i < d.tokens; i += W) {
    const int64_t rows = std::min<int64_t>(W, d.tokens - i);
    const double start = i ? d.L[i - 1] : 0;
    for (int r = 0; r < W; ++r) {
      const double L = d.L[i + r] - start;
      high[r] = float(L);
      low[r] = float(L - double(high[r]));
    }
    store(near, exp(load(high)));
    for (int64_t j = 0; j < i; j += W) {
      const vf far = exp(narrow(d.L + j, -1, start));
      for (int64_t r = 0; r < rows; ++r) use(i + r, j, splat(near[r]) * far, splat_int(-1));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const vf L = (splat(high[r]) - load(high)) + (splat(low[r]) - load(low));
      const vi seen = lane <= int32_t(r);
      use(i + r, i, exp(select(seen, L, splat(kLeast))), seen);
    }
  }
}

// Y arrives as <dv[i], x[j]>. With the decay F[i, j] = exp(L[i] - L[j]): E += Y F delta[j], M = CB F, Y = Y F CB. All
// are 0 above the diagonal, also where a token that has yet to come is NaN.
inline void decay_scores(const Work& w, const Decays& decays, const float* delta) {
  for_decays(decays, [&](int64_t i, int64_t j, vf F, vi seen) {
    const int64_t at = i * w.tokens + j;
    const vf score = select(seen, load(w.Y + at) * F, vf{}), CB = select(seen, load(w.CB + at), vf{});
    store(w.E + at, fma(score, select(seen, load(delta + j), vf{}), load(w.E + at)));
    store(w.M + at, CB * F);
    store(w.Y + at, score * CB);
  });
}

// columns[j] = sum over i >= j of Y[i, j]; crossing[k] = sum over j < k <= i of Y[i, j] delta[j]. The sums over i run
// up from the last row; nothing is subtracted.
inline void sum_scores(const Work& w, int64_t tokens, const float* delta) {
  alignas(64) float parts[W * W] = {};
  const vi lane = lane_numbers();
  for (int64_t j = 0; j < tokens; j += W) store(w.columns + j, vf{});
  for (int64_t k0 = (tokens - 1) / W * W; k0 >= 0; k0 -= W) {
    for (int64_t k = std::min(k0 + W, tokens) - 1; k >= k0; --k) {
      vf total{};
      for (int64_t j = 0; j <= k; j += W) {
        const vf column = load(w.columns + j) + load(w.Y + k * w.tokens + j), part = column * load(delta + j);
        store(w.columns + j, column);
        total += j < k0 ? part : select(lane < int32_t(k - k0), part, vf{});
      }
      store(parts + (k - k0) * W, total);
    }
    vf row[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) row[i] = load(parts + i * W);
    transpose(row);
    vf total = row[0];
#pragma GCC unroll 16
    for (int i = 1; i < W; ++i) total += row[i];
    store(w.crossing + k0, total);
  }
}

// d delta / d dt of a head: -1 where the limits cut delta off
inline void read_slopes(const Ssd& s, const Place& p, float* slope) {
  const int64_t tokens = p.chunk.tokens;
  const vf bias = splat(s.dt_bias ? s.dt_bias[p.head()] : 0.f);
  for (int64_t t = 0; t < tokens; ++t) slope[t] = load(s.dt, p.at(s.dt, t) + p.head(), 1)[0];
  for (int64_t t = 0; t < tokens; t += W) {
    vf delta = load(slope + t, tokens - t) + bias, d = splat(1.f);
    if (s.dt_softplus) delta = softplus(delta, d);
    store(slope + t, select((delta < s.dt_low) | (delta > s.dt_high), splat(-1.f), d));
  }
}

// The gradient of the steps. dots_C[i] = <C[i], S^T dv[i]>, dots_B[j] = <B[j], G^T x[j]>, GS = <G, S>.
inline void write_steps(const Ssd& s, const Work& w, const Place& p, const Decays& decays, const float* delta,
                        float GS) {
  const double A = s.A[p.head()];
  const float cut_off = A <= 0 ? 0.f : NAN;   // whatever reaches delta there, unless the head has no gradient
  float* const slope = w.weight;   // no longer needed
  read_slopes(s, p, slope);
  double sum = 0;   // of what the tokens before t put into the state after the chunk
  for (int64_t t = 0; t < p.chunk.tokens; ++t) {
    w.crossing[t] += float(sum);
    w.dots_B[t] *= decays.after[t];
    sum += double(delta[t]) * w.dots_B[t];
  }
  double dA = 0, dbias = 0;
  sum = double(decays.before[p.chunk.tokens - 1]) * GS;   // and of what reaches the state or v from t on
  for (int64_t t = p.chunk.tokens - 1; t >= 0; --t) {
    sum += double(decays.before[t]) * w.dots_C[t];
    const double da = sum + w.crossing[t], ddelta = double(w.columns[t]) + w.dots_B[t] + A * da;
    const float ddt = slope[t] < 0.f ? cut_off : float(ddelta * slope[t]);
    dA += delta[t] * da;
    dbias += ddt;
    store(s.ddt, p.at(s.ddt, t) + p.head(), splat(ddt), 1);
  }
  w.dA[p.i] += dA;
  w.dbias[p.i] += dbias;
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
