// One head in one chunk: the products of the recomputed state S and of its gradient G, both kept as [N, P].
#pragma once
#include "ssd/backward_steps.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// to[i][j] = <left[i], right[:, j]> where j <= i, and in the rest of the tiles that hold those
inline void lower_product(const Work& w, int64_t tokens, const float* left, int64_t left_width, const float* right,
                          int64_t depth, float* to) {
  for (int64_t i = 0; i < tokens; i += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, tokens - i);
    for_tiles(rows, i + rows, [&]<int R, int C>(int64_t r, int64_t j) {
      vf sum[R][C] = {};
      multiply(sum, left + (i + r) * left_width, left_width, 1, right + j, w.tokens, depth);
      store_tile(to + (i + r) * w.tokens + j, w.tokens, sum);
    });
  }
}

// weight[t] = exp(L[Q] - L[t]) delta[t]: what of x[t] is in the state after the chunk
inline void weigh_tokens(const Work& w, const Decays& decays, const float* delta) {
  for (int64_t t = 0; t < decays.tokens; t += W) store(w.weight + t, load(decays.after + t) * load(delta + t));
}

// scaled[t] = by[t] from[t]
inline void scale_tokens(const Work& w, int64_t tokens, const float* from, const float* by) {
  for (int64_t t = 0; t < tokens; ++t) {
    const vf f = splat(by[t]);
    for (int64_t p = 0; p < w.width; p += W) store(w.scaled + t * w.width + p, f * load(from + t * w.width + p));
  }
}

// to = exp(L[Q]) from + sum over tokens of left[t] scaled[t]^T. Returns <from, other> where there is another.
// each(n, p, R, C) is called before a tile.
template <bool kDot, class Each>
inline float carry(const Ssd& s, const Work& w, const Decays& decays, const float* from, const float* left, float* to,
                   const float* other, Each each) {
  const vf whole = decays.whole();
  const bool slow = decays.slow();
  vf dot{};
  for_tiles(s.states, s.width, [&]<int R, int C>(int64_t n, int64_t p) {
    each(n, p, R, C);
    vf sum[R][C] = {};
    multiply(sum, left + n, 1, w.states, w.scaled + p, w.width, decays.tokens);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {   // what is carried comes last: its loads run while the products do
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int64_t i = (n + r) * w.width + p + c * W;
        const vf before = load(from + i);
        if constexpr (kDot) dot = fma(before, load(other + i), dot);
        store(to + i, slow ? sum[r][c] + decayed<true>(whole, before) : fma(whole, before, sum[r][c]));
      }
    }
  });
  return sum(dot);
}

// total[n][t] += by[t] (state rows)[n][t]; dots[t] = sum over n of other[n][t] (state rows)[n][t]
inline void apply_state(const Ssd& s, const Work& w, int64_t tokens, const float* state, const float* rows,
                        const float* by, const float* other, float* total, float* dots) {
  for (int64_t t = 0; t < tokens; t += W) store(dots + t, vf{});
  for_tiles(s.states, tokens, [&]<int R, int C>(int64_t n, int64_t t) {
    vf sum[R][C] = {}, dot[C];
    multiply(sum, state + n * w.width, w.width, 1, rows + t, w.tokens, s.width);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) dot[c] = load(dots + t + c * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int64_t i = (n + r) * w.tokens + t + c * W;
        dot[c] = fma(load(other + i), sum[r][c], dot[c]);
        store(total + i, fma(load(by + t + c * W), sum[r][c], load(total + i)));
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(dots + t + c * W, dot[c]);
  });
}

// U[j] = sum over i >= j of M[i, j] dv[i] + exp(L[Q] - L[j]) G B[j], in `scaled`. Meanwhile rows come in: of the inputs
// of the head that follows, and of this one's dx.
inline void gradient_of_inputs(const Ssd& s, const Work& w, const Place& here, const Place& next, const float* after,
                               const float* G) {
  const int64_t tokens = here.chunk.tokens, soon = next.chunk.tokens;
  for_tiles(tokens, s.width, [&]<int R, int C>(int64_t j, int64_t p) {
    const int64_t rows = std::clamp<int64_t>(soon - j, 0, R);
    for (const View* v : {&s.x, &s.dy, &s.z, &s.ungated}) {
      if (*v) prefetch<0>(*v, next.at(*v, j) + p, rows, C * W);
    }
    prefetch<1>(s.dx, here.at(s.dx, j) + p, R, C * W);
    vf sum[R][C] = {};
    multiply(sum, w.B + j * w.states, w.states, 1, G + p, w.width, s.states);
    scale_rows(sum, after + j);
    const float* const M = w.M + j * w.tokens + j;
    const float* const dv = w.dv + j * w.width + p;
    multiply_upper(sum, M, 1, w.tokens, dv, w.width);
    multiply(sum, M + R * w.tokens, 1, w.tokens, dv + R * w.width, w.width, tokens - j - R);
    store_tile(w.scaled + j * w.width + p, w.width, sum);
  });
}

// dv = dy silu(z); writes dz.
inline void read_gradient(const Ssd& s, const Work& w, const Place& here) {
  const int64_t tokens = here.chunk.tokens;
  if (s.dy) load_rows(w.dv, s.dy, here.at(s.dy), s.dy.stride[1], tokens, s.width);
  else std::fill_n(w.dv, tokens * w.width, 0.f);
  for (int64_t t = 0; s.z && t < tokens; ++t) {
    const int64_t z_at = here.at(s.z, t), v_at = here.at(s.ungated, t), dz_at = here.at(s.dz, t);
    for (int64_t p = 0; p < s.width; p += W) {
      float* const dv = w.dv + t * w.width + p;
      const vf z = load(s.z, z_at + p, s.width - p), gate = sigmoid(z), dy = load(dv);
      const vf v = load(s.ungated, v_at + p, s.width - p);
      store(s.dz, dz_at + p, dy * v * gate * fma(z, 1.f - gate, splat(1.f)), s.width - p);
      store(dv, dy * z * gate);
    }
  }
}

// dx = delta U + D dv, and the part of dD
inline void write_inputs(const Ssd& s, const Work& w, const Place& here, const float* delta) {
  const int64_t head = here.head();
  for (int64_t p = 0; p < s.width; p += W) {
    vf D{}, dD{};
    if (s.D) D = s.D_width > 1 ? load(s.D + head * s.D_width + p, s.width - p) : splat(s.D[head]);
    for (int64_t t = 0; t < here.chunk.tokens; ++t) {
      const int64_t i = t * w.width + p;
      const vf dv = load(w.dv + i), dx = delta[t] * load(w.scaled + i);
      dD = fma(dv, load(w.x + i), dD);
      store(s.dx, here.at(s.dx, t) + p, fma(D, dv, dx), s.width - p);
    }
    double* const to = w.dD + here.i * w.width + p;
    for (int i = 0; i < W; ++i) to[i] += dD[i];
  }
}

// S before the chunk; G after it, and then before it.
inline void walk_head(const Ssd& s, const Work& w, const Place& here, const Place& next, const float* S, float* G) {
  const int64_t tokens = here.chunk.tokens;
  const float* const delta = w.delta + here.i * w.tokens;
  const Decays decays(w.log_a + here.i * w.tokens, tokens);
  load_rows(w.x, s.x, here.at(s.x), s.x.stride[1], tokens, s.width);
  read_gradient(s, w, here);
  transpose_rows(w.xt, w.tokens, w.x, w.width, tokens, s.width);
  transpose_rows(w.dvt, w.tokens, w.dv, w.width, tokens, s.width);
  lower_product(w, tokens, w.dv, w.width, w.xt, s.width, w.Y);
  decay_scores(w, decays, delta);
  sum_scores(w, tokens, delta);
  weigh_tokens(w, decays, delta);
  apply_state(s, w, tokens, S, w.dvt, decays.before, w.Ct, w.dCt, w.dots_C);
  apply_state(s, w, tokens, G, w.xt, w.weight, w.Bt, w.dBt, w.dots_B);
  gradient_of_inputs(s, w, here, next, decays.after, G);
  write_inputs(s, w, here, delta);
  scale_tokens(w, tokens, w.dv, decays.before);
  const auto none = [](int64_t, int64_t, int, int) {};
  const float GS = carry<true>(s, w, decays, G, w.C, G, S, none);
  write_steps(s, w, here, decays, delta, GS);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
