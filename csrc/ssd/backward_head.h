// One head in one chunk: the products of the recomputed state S and of its gradient G, both kept as [N, P].
#pragma once
#include "ssd/backward_steps.h"

namespace pyseq::PYSEQ_ISA {
namespace {

inline int64_t at(const View& v, const Unit& unit, int64_t t, int64_t head) {
  return unit.row * v.stride[0] + t * v.stride[1] + head * v.stride[2];
}

// Rows of tensors that the head after this one will read or write, asked for while products run: a row of one head is a
// page away from the next, further than the machine looks ahead by itself.
struct Ahead {
  View of[6] = {};
  int64_t at[6] = {}, rows = 0, width = 0;
  void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows) {
      for (int i = 0; i < 6 && of[i]; ++i) {
        const char* const row = static_cast<const char*>(of[i].at(at[i]));
        for (int64_t byte = 0; byte < width * size_of(of[i].type); byte += 64) __builtin_prefetch(row + byte, 0, 2);
        at[i] += of[i].stride[1];
      }
    }
  }
};

// After the last head of a unit comes the first of `next`, the chunk that is taken next.
inline Ahead ahead(const Ssd& s, const Unit& unit, const Chunk& chunk, const Chunk& next, int64_t head,
                   std::initializer_list<const View*> views) {
  const bool same = head + 1 < unit.head + unit.heads;
  const Chunk& c = same ? chunk : next;
  Ahead a;
  a.rows = c.tokens;
  a.width = s.width;
  int i = 0;
  for (const View* v : views) {
    if (!*v) continue;
    a.of[i] = *v;
    a.at[i++] = at(*v, unit, c.begin, same ? head + 1 : unit.head);
  }
  return a;
}

// to[i][j] = <left[i], right[:, j]> where j <= i, and in the rest of the tiles that hold those
inline void lower_product(const Work& w, const Chunk& chunk, const float* left, int64_t left_width, const float* right,
                          int64_t depth, float* to) {
  for (int64_t i = 0; i < chunk.tokens; i += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, chunk.tokens - i);
    for_tiles(rows, i + rows, [&]<int R, int C>(int64_t r, int64_t j) {
      vf sum[R][C] = {};
      multiply(sum, left + (i + r) * left_width, left_width, 1, right + j, w.tokens, depth);
      store_tile(to + (i + r) * w.tokens + j, w.tokens, sum);
    });
  }
}

// scaled[t] = by[t] from[t]
inline void scale_tokens(const Work& w, const Chunk& chunk, const float* from, const float* by) {
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const vf f = splat(by[t]);
    for (int64_t p = 0; p < w.width; p += W) {
      store(w.scaled + t * w.width + p, f * load(from + t * w.width + p));
    }
  }
}

// to = decay from + sum over tokens of left[t] scaled[t]^T. Returns <from, other> where there is another.
template <bool kDot>
inline float carry(const Ssd& s, const Work& w, const Chunk& chunk, float decay, const float* from, const float* left,
                   float* to, const float* other, Ahead& ahead) {
  vf dot{};
  for_tiles(s.states, s.width, [&]<int R, int C>(int64_t n, int64_t p) {
    vf sum[R][C] = {};
    ahead.fetch(3);
    multiply(sum, left + n, 1, w.states, w.scaled + p, w.width, chunk.tokens);
    const int64_t at = n * w.width + p;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {   // what is carried comes last: its loads run while the products do
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int64_t i = at + r * w.width + c * W;
        const vf before = load(from + i);
        if constexpr (kDot) dot = fma(before, load(other + i), dot);
        store(to + i, fma(splat(decay), before, sum[r][c]));
      }
    }
  });
  return sum(dot);
}

// total[n][t] += by[t] (state rows)[n][t]; dots[t] = sum over n of other[n][t] (state rows)[n][t]
inline void apply_state(const Ssd& s, const Work& w, const Chunk& chunk, const float* state, const float* rows,
                        const float* by, const float* other, float* total, float* dots, Ahead& ahead) {
  for (int64_t t = 0; t < chunk.tokens; t += W) store(dots + t, vf{});
  for_tiles(s.states, chunk.tokens, [&]<int R, int C>(int64_t n, int64_t t) {
    vf sum[R][C] = {}, dot[C];
    ahead.fetch(2);
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

// U[j] = sum over i >= j of M[i, j] dv[i] + exp(L[Q] - L[j]) G B[j], in `scaled`
inline void gradient_of_inputs(const Ssd& s, const Work& w, const Chunk& chunk, const float* G) {
  for_tiles(chunk.tokens, s.width, [&]<int R, int C>(int64_t j, int64_t p) {
    vf sum[R][C] = {};
    multiply(sum, w.B + j * w.states, w.states, 1, G + p, w.width, s.states);
    scale_rows(sum, w.steps.to_end + j);
    const float* const M = w.M + j * w.tokens + j;
    const float* const dv = w.dv + j * w.width + p;
    multiply_upper(sum, M, 1, w.tokens, dv, w.width);
    multiply(sum, M + R * w.tokens, 1, w.tokens, dv + R * w.width, w.width, chunk.tokens - j - R);
    store_tile(w.scaled + j * w.width + p, w.width, sum);
  });
}

// dv = dy silu(z); writes dz.
inline void read_gradient(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head) {
  if (s.dy) load_rows(w.dv, s.dy, at(s.dy, unit, chunk.begin, head), s.dy.stride[1], chunk.tokens, s.width);
  else std::fill_n(w.dv, chunk.tokens * w.width, 0.f);
  if (!s.z) return;
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int64_t z_at = at(s.z, unit, chunk.begin + t, head), v_at = at(s.ungated, unit, chunk.begin + t, head);
    const int64_t dz_at = at(s.dz, unit, chunk.begin + t, head);
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
inline void write_inputs(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, int64_t head) {
  for (int64_t p = 0; p < s.width; p += W) {
    vf D{}, dD{};
    if (s.D) D = s.D_width > 1 ? load(s.D + head * s.D_width + p, s.width - p) : splat(s.D[head]);
    for (int64_t t = 0; t < chunk.tokens; ++t) {
      const int64_t i = t * w.width + p;
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
                      float* G, Ahead ahead) {
  const Steps& k = w.steps;
  load_rows(w.x, s.x, at(s.x, unit, chunk.begin, head), s.x.stride[1], chunk.tokens, s.width);
  read_gradient(s, w, unit, chunk, head);
  transpose_rows(w.xt, w.tokens, w.x, w.width, chunk.tokens, w.width);
  transpose_rows(w.dvt, w.tokens, w.dv, w.width, chunk.tokens, w.width);
  lower_product(w, chunk, w.dv, w.width, w.xt, s.width, w.Y);
  decay_scores(w, chunk);
  sum_scores(w, chunk);
  apply_state(s, w, chunk, S, w.dvt, k.from_start, w.Ct, w.dCt, w.dots_C, ahead);
  apply_state(s, w, chunk, G, w.xt, k.weight, w.Bt, w.dBt, w.dots_B, ahead);
  gradient_of_inputs(s, w, chunk, G);
  write_inputs(s, w, unit, chunk, head);
  scale_tokens(w, chunk, w.dv, k.from_start);
  const float GS = carry<true>(s, w, chunk, k.decay, G, w.C, G, S, ahead);
  write_steps(s, w, unit, chunk, head, GS);
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
