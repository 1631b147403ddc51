// The forward chunk by chunk: products of matrices, between which the state is read and written once.
#pragma once
#include "delta_rule/chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

struct ChunkForward {
  int64_t columns;   // whole vectors of V
  Chunk inside;
  float *S, *v, *p;  // [K, columns]; [kChunk, columns] twice

  static int64_t size(const DeltaRule& s) {
    return Chunk::size(s) + (s.keys + 2 * kChunk) * whole_vectors(s.values);
  }
  explicit ChunkForward(const DeltaRule& s)
      : columns(whole_vectors(s.values)), inside(s, s.scratch), S(s.scratch + Chunk::size(s)),
        v(S + s.keys * columns), p(v + kChunk * columns) {}
};

// P = M (Aak V + A exp(ge) S)
void correct_chunk(const DeltaRule& s, const ChunkForward& f) {
  const Chunk& c = f.inside;
  for_tiles(c.tokens, s.values, [&]<int R, int C>(int64_t i, int64_t p) {
    vf sum[R][C] = {};
    multiply(sum, c.a_in + i * c.width, c.width, 1, f.S + p, f.columns, s.keys);
    const float* const A = c.Aak + i * kChunk;
    multiply(sum, A, kChunk, 1, f.v + p, f.columns, i);
    multiply_lower(sum, A + i, kChunk, 1, f.v + i * f.columns + p, f.columns);
    store_tile(f.p + i * f.columns + p, f.columns, sum);
  });
  solve<false>(c, f.p, f.columns);
}

// Y = scale (Q exp(gi)) S + Aqk V + Aqb P
template <bool corrected> void read_chunk(const DeltaRule& s, const ChunkForward& f, const Unit& u, int64_t t) {
  const Chunk& c = f.inside;
  for_tiles(c.tokens, u.columns, [&]<int R, int C>(int64_t i, int64_t p) {
    vf sum[R][C] = {};
    multiply(sum, c.q_in + i * c.width, c.width, 1, f.S + p, f.columns, s.keys);
    const auto add = [&](const float* A, const float* rows) {
      multiply(sum, A + i * kChunk, kChunk, 1, rows + p, f.columns, i);
      multiply_lower(sum, A + i * kChunk + i, kChunk, 1, rows + i * f.columns + p, f.columns);
    };
    add(c.Aqk, f.v);
    if constexpr (corrected) add(c.Aqb, f.p);
    for (int r = 0; r < R; ++r) {
      const int64_t at = u.at(s.y, t + i + r) + u.column + p;
      for (int k = 0; k < C && p + k * W < u.columns; ++k) store(s.y, at + k * W, sum[r][k], u.columns - p - k * W);
    }
  });
}

// S = exp(gl) S + (K exp(gl - gi))^T V + (B exp(gl - gi))^T P
template <bool corrected, bool decayed> void write_chunk(const DeltaRule& s, const ChunkForward& f) {
  const Chunk& c = f.inside;
  for_tiles(s.keys, s.values, [&]<int R, int C>(int64_t k, int64_t p) {
    vf sum[R][C];
    load_tile(sum, f.S + k * f.columns + p, f.columns);
    for (int r = 0; r < R && decayed; ++r) {
      const vf left = splat(c.left[k + r]);
      const vi kept = splat_int(c.left_kept[k + r]);
      for (vf& S : sum[r]) S = fma(left, S, as_float(as_int(S) & kept));
    }
    multiply(sum, c.k_out + k, 1, c.width, f.v + p, f.columns, c.tokens);
    if constexpr (corrected) multiply(sum, c.b_out + k, 1, c.width, f.p + p, f.columns, c.tokens);
    store_tile(f.S + k * f.columns + p, f.columns, sum);
  });
}

template <bool corrected, bool decayed> void forward_chunks(const DeltaRule& s, const Unit& u) {
  ChunkForward f(s);
  if (s.state) load_rows(f.S, s.state + state_at(s, u, u.sequence), s.values, s.keys, s.values);
  else std::fill_n(f.S, s.keys * f.columns, 0.f);
  const auto keep = [&](float* to) {
    for (int64_t k = 0; k < s.keys; ++k) std::copy_n(f.S + k * f.columns, s.values, to + k * s.values);
  };
  for (int64_t t = u.begin; t < u.end; t += kChunk) {
    if (float* const to = kept_at(s, u, t)) keep(to);
    load_chunk(s, f.inside, u, t, std::min(kChunk, u.end - t));
    load_rows(f.v, s.v, u.at(s.v, t), s.v.stride[1], f.inside.tokens, s.values);
    prepare_chunk<corrected, decayed>(s, f.inside);
    if constexpr (corrected) correct_chunk(s, f);
    read_chunk<corrected>(s, f, u, t);
    if (t + kChunk < u.end || s.state_out) write_chunk<corrected, decayed>(s, f);
  }
  if (s.state_out) keep(s.state_out + state_at(s, u, u.sequence));
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
