// The steps of a head in a chunk, and what the scores of the chunk say about them.
#pragma once
#include "ssd/backward_work.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline vf lane_numbers() {
  vf v;
  for (int i = 0; i < W; ++i) v[i] = float(i);
  return v;
}

inline void read_steps(const Ssd& s, const Unit& unit, const Chunk& chunk, int64_t head, Steps& k) {
  const int64_t at = unit.row * s.dt.stride[0] + chunk.begin * s.dt.stride[1] + head;
  for (int64_t t = 0; t < chunk.padded; ++t) {
    k.delta[t] = t < chunk.tokens ? load(s.dt, at + t * s.dt.stride[1], 1)[0] : 0.f;
  }
  for (int64_t t = 0; t < chunk.padded; t += W) {
    vf delta = load(k.delta + t) + splat(s.dt_bias ? s.dt_bias[head] : 0.f), slope = splat(1.f);
    if (s.dt_softplus) delta = softplus(delta, slope);
    store(k.slope + t, select((delta < s.dt_low) | (delta > s.dt_high), vf{}, slope));
    store(k.delta + t, at_most(at_least(delta, s.dt_low), s.dt_high));
  }
  const float A = s.A[head];
  double L = 0;
  for (int64_t t = 0; t < chunk.padded; ++t) {
    if (t < chunk.tokens) {
      const float a = k.delta[t] * A;
      L += A <= 0.f ? (a < kLeast ? kLeast : a) : NAN;
    } else {
      k.delta[t] = 0.f;
    }
    k.high[t] = float(L);
    k.low[t] = float(L - k.high[t]);
  }
  const vf high = splat(k.high[chunk.padded - 1]), low = splat(k.low[chunk.padded - 1]);
  for (int64_t t = 0; t < chunk.padded; t += W) {
    const vf from_start = exp(load(k.high + t));
    store(k.from_start + t, fma(from_start, load(k.low + t), from_start));
    const vf to_end = exp((high - load(k.high + t)) + (low - load(k.low + t)));
    store(k.to_end + t, to_end);
    store(k.weight + t, to_end * load(k.delta + t));
  }
  k.decay = k.from_start[chunk.padded - 1];
}

// Y arrives as <dv[i], x[j]>. With the decay F[i, j] = exp(L[i] - L[j]): E += Y F delta[j], M = CB F, Y = Y F CB.
inline void decay_scores(const Work& w, const Chunk& chunk) {
  const vf lane = lane_numbers();
  const Steps& k = w.steps;
  for (int64_t i = 0; i < chunk.tokens; ++i) {
    const vf high = splat(k.high[i]), low = splat(k.low[i]);
    for (int64_t j = 0; j <= i; j += W) {
      const int64_t at = i * w.tokens + j;
      const vf L = (high - load(k.high + j)) + (low - load(k.low + j));
      const vf F = exp(select(lane <= splat(float(i - j)), L, splat(kLeast)));
      const vf score = load(w.Y + at) * F, CB = load(w.CB + at);
      store(w.E + at, fma(score, load(k.delta + j), load(w.E + at)));
      store(w.M + at, CB * F);
      store(w.Y + at, score * CB);
    }
  }
}

// columns[j] = sum over i >= j of Y[i, j]; crossing[k] = sum over j < k <= i of Y[i, j] delta[j]. The sums over i run up
// from the last row; nothing is subtracted.
inline void sum_scores(const Work& w, const Chunk& chunk) {
  alignas(64) float parts[W * W] = {};
  const vf lane = lane_numbers();
  for (int64_t j = 0; j < chunk.padded; j += W) store(w.columns + j, vf{});
  for (int64_t k0 = chunk.padded - W; k0 >= 0; k0 -= W) {
    for (int64_t k = std::min(k0 + W, chunk.tokens) - 1; k >= k0; --k) {
      vf total{};
      for (int64_t j = 0; j <= k; j += W) {
        const vf column = load(w.columns + j) + load(w.Y + k * w.tokens + j), part = column * load(w.steps.delta + j);
        store(w.columns + j, column);
        total += select(lane < splat(float(k - j)), part, vf{});
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

// The gradient of the steps. dots_C[i] = <C[i], S^T dv[i]>, dots_B[j] = <B[j], G^T x[j]>, GS = <G, S>.
inline void write_steps(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head, float GS) {
  const Steps& k = w.steps;
  const double A = s.A[head];
  const int64_t at = unit.row * s.ddt.stride[0] + chunk.begin * s.ddt.stride[1] + head, i = head - unit.head;
  double da_end = double(k.decay) * GS, dA = 0, dbias = 0;
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    w.dots_C[t] *= k.from_start[t];
    w.dots_B[t] *= k.to_end[t];
  }
  double before = 0;   // of the tokens before t: parts of the state after the chunk
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const double part = double(k.delta[t]) * w.dots_B[t];
    w.crossing[t] += float(before);
    before += part;
  }
  for (int64_t t = chunk.tokens - 1; t >= 0; --t) {
    da_end += w.dots_C[t];
    const double da = da_end + w.crossing[t];
    const double ddelta = double(w.columns[t]) + w.dots_B[t] + A * da;
    const float ddt = float(ddelta * k.slope[t]);
    dA += k.delta[t] * da;
    dbias += ddt;
    store(s.ddt, at + t * s.ddt.stride[1], splat(ddt), 1);
  }
  w.dA[i] += dA;
  w.dbias[i] += dbias;
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
