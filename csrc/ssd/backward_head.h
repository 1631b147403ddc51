// One head in one chunk: the products of the recomputed state S and of its gradient G, both kept as [N, P].
#pragma once
#include "ssd/backward_steps.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline int64_t at(const View& v, const Unit& unit, int64_t t, int64_t head) {
  return unit.row * v.stride[0] + t * v.stride[1] + head * v.stride[2];
}

// scaled[t] = by[t] from[t]
inline void scale_rows(const Work& w, const Chunk& chunk, const float* from, const float* by) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const vf f = splat(by[t]);
    for (int64_t p = 0; p < w.width; p += W) {
      store(w.scaled + t * w.width_pitch + p, f * load(from + t * w.width_pitch + p));
    }
  }
}

// to = decay from + sum over tokens of left[t] scaled[t]^T. Returns <from, other> where there is another.
template <bool kDot>
inline float carry(const Work& w, const Chunk& chunk, float decay, const float* from, const float* left, float* to,
                   const float* other = nullptr) {
  vf dot[2] = {};
  each_tile(w.states, w.width, [&](auto C, int64_t n, int64_t p) {
    vf sum[kRows][C];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      each_vector<C>([&](auto c) {
        const int64_t i = (n + r) * w.width_pitch + p + c * W;
        const vf before = load(from + i);
        if constexpr (kDot) dot[c] = fma(before, load(other + i), dot[c]);
        sum[r][c] = decay * before;
      });
    }
    multiply<Left::columns>(sum, left + n, w.state_pitch, w.scaled + p, w.width_pitch, chunk.tokens);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      each_vector<C>([&](auto c) { store(to + (n + r) * w.width_pitch + p + c * W, sum[r][c]); });
    }
  });
  return sum(dot[0] + dot[1]);
}

// total[n][t] += by[t] (state rows)[n][t]; dots[t] = sum over n of other[n][t] (state rows)[n][t]
inline void apply_state(const Ssd& s, const Work& w, const Chunk& chunk, const float* state, const float* rows,
                        const float* by, const float* other, float* total, float* dots) {
  for (int64_t t = 0; t < chunk.padded; t += W) store(dots + t, vf{});
  each_tile(w.states, chunk.padded, [&](auto C, int64_t n, int64_t t) {
    vf sum[kRows][C] = {};
    multiply<Left::rows>(sum, state + n * w.width_pitch, w.width_pitch, rows + t, w.token_pitch, s.width);
    each_vector<C>([&](auto c) {
      const vf f = load(by + t + c * W);
      vf dot = load(dots + t + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = (n + r) * w.token_pitch + t + c * W;
        dot = fma(load(other + i), sum[r][c], dot);
        store(total + i, fma(f, sum[r][c], load(total + i)));
      }
      store(dots + t + c * W, dot);
    });
  });
}

// U[j] = sum over i >= j of M[i, j] dv[i] + exp(L[Q] - L[j]) G B[j], in `scaled`
inline void gradient_of_inputs(const Ssd& s, const Work& w, const Chunk& chunk, const float* G) {
  each_tile(chunk.tokens, w.width, [&](auto C, int64_t j, int64_t p) {
    vf sum[kRows][C] = {};
    multiply<Left::rows>(sum, w.B + j * w.state_pitch, w.state_pitch, G + p, w.width_pitch, s.states);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      each_vector<C>([&](auto c) { sum[r][c] *= splat(w.steps.to_end[j + r]); });
    }
    multiply<Left::columns>(sum, w.M + j * w.token_pitch + j, w.token_pitch, w.dv + j * w.width_pitch + p, w.width_pitch,
                            chunk.tokens - j);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      each_vector<C>([&](auto c) { store(w.scaled + (j + r) * w.width_pitch + p + c * W, sum[r][c]); });
    }
  });
}

// dv = dy silu(z); writes dz.
inline void read_gradient(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head) {
  const int64_t dy = at(s.dy, unit, chunk.begin, head);
  load_rows(s.dy, dy, s.dy.stride[1], s.dy ? chunk.tokens : 0, chunk.padded, s.width, w.dv, w.width_pitch);
  if (!s.z) return;
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int64_t z_at = at(s.z, unit, chunk.begin + t, head), v_at = at(s.ungated, unit, chunk.begin + t, head);
    const int64_t dz_at = at(s.dz, unit, chunk.begin + t, head);
    for (int64_t p = 0; p < s.width; p += W) {
      float* const dv = w.dv + t * w.width_pitch + p;
      const vf z = load(s.z, z_at + p, s.width - p), gate = sigmoid(z), dy = load(dv);
      const vf v = load(s.ungated, v_at + p, s.width - p);
      store(s.dz, dz_at + p, dy * v * gate * fma(z, 1.f - gate, splat(1.f)), s.width - p);
      store(dv, dy * z * gate);
    }
  }
}

// dx = delta U + D dv, and the part of dD
inline void write_inputs(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head) {
  for (int64_t p = 0; p < s.width; p += W) {
    vf D{}, dD{};
    if (s.D) D = s.D_width > 1 ? load(s.D + head * s.D_width + p, s.width - p) : splat(s.D[head]);
    for (int64_t t = 0; t < chunk.tokens; ++t) {
      const int64_t i = t * w.width_pitch + p;
      const vf dv = load(w.dv + i), dx = w.steps.delta[t] * load(w.scaled + i);
      dD = fma(dv, load(w.x + i), dD);
      store(s.dx, at(s.dx, unit, chunk.begin + t, head) + p, fma(D, dv, dx), s.width - p);
    }
    double* const to = w.dD + (head - unit.head) * w.width + p;
    for (int i = 0; i < W; ++i) to[i] += dD[i];
  }
}

// S before the chunk; G after it, and then before it.
inline void walk_head(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head, const float* S,
                      float* G) {
  const Steps& k = w.steps;
  load_rows(s.x, at(s.x, unit, chunk.begin, head), s.x.stride[1], chunk.tokens, chunk.padded, s.width, w.x, w.width_pitch);
  read_gradient(s, w, unit, chunk, head);
  transposed(w.x, w.width_pitch, chunk.padded, w.width, w.xt, w.token_pitch, w.width, chunk.padded);
  transposed(w.dv, w.width_pitch, chunk.padded, w.width, w.dvt, w.token_pitch, w.width, chunk.padded);
  lower_product(chunk.padded, s.width, w.dv, w.width_pitch, w.xt, w.token_pitch, w.Y, w.token_pitch);
  decay_scores(w, chunk);
  sum_scores(w, chunk);
  apply_state(s, w, chunk, S, w.dvt, k.from_start, w.Ct, w.dCt, w.dots_C);
  apply_state(s, w, chunk, G, w.xt, k.weight, w.Bt, w.dBt, w.dots_B);
  gradient_of_inputs(s, w, chunk, G);
  write_inputs(s, w, unit, chunk, head);
  scale_rows(w, chunk, w.dv, k.from_start);
  const float GS = carry<true>(w, chunk, k.decay, G, w.C, G, S);
  write_steps(s, w, unit, chunk, head, GS);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
