// How the backward pass is dealt out: what units leave in the workspace, and what a thread works in.
#pragma once
#include <algorithm>

#include "ssd/chunk.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kHeads = 6;     // of a unit: its dB and dC are summed before they are written
constexpr int64_t kUnits = 8;     // fewer, and units have half as many heads, on any machine
constexpr int64_t kChunk = 64;
constexpr int64_t kKept = 4 << 20;   // floats of states kept at a time, unless the root of the chunks are more

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t most_heads(const Ssd& s) {
  const int64_t units = s.sequences * s.groups * blocks_of_group(s, kHeads), per_group = s.heads / s.groups;
  return std::clamp<int64_t>(per_group, 1, units < kUnits ? kHeads / 2 : kHeads);
}
inline int64_t blocks(const Ssd& s) { return blocks_of_group(s, most_heads(s)); }

inline int64_t longest_sequence(const Ssd& s) {
  if (!s.cu_seqlens) return s.time;
  int64_t longest = 0;
  for (int64_t q = 0; q < s.sequences; ++q) longest = std::max(longest, s.cu_seqlens[q + 1] - s.cu_seqlens[q]);
  return longest;
}

// The workspace: dB and dC of every block, unless it is the only one of its group; dA, ddt_bias and dD of every
// sequence.
inline bool whole_groups(const Ssd& s) { return blocks(s) == 1; }
inline int64_t slab_floats(const Ssd& s) {
  return whole_groups(s) ? 0 : blocks(s) * s.batch * s.time * s.groups * 2 * s.states;
}
inline int64_t block_of(const Ssd& s, const Unit& u) {   // head = per_group block / blocks, rounded down
  const int64_t per_group = s.heads / s.groups;
  return ceil_div((u.head - u.group * per_group) * blocks(s), per_group);
}
inline float* slab(const Ssd& s, int64_t block, int64_t token, int64_t group) {   // [2, N]: dB, dC
  return s.workspace + ((block * s.batch * s.time + token) * s.groups + group) * 2 * s.states;
}
inline float* sums_A(const Ssd& s) { return s.workspace + slab_floats(s); }       // [S, H]
inline float* sums_bias(const Ssd& s) { return sums_A(s) + s.sequences * s.heads; }
inline float* sums_D(const Ssd& s) { return sums_bias(s) + s.sequences * s.heads; }   // [S, H, D_width]

// What a thread works in. Matrices have rows of whole vectors; a state is [N, P].
struct Work {
  int64_t chunk, span;                            // tokens in a chunk, chunks in a span
  int64_t tokens, states, width, state_size;      // floats in a row over tokens, over N, over P; in a state
  float *B, *C, *Bt, *Ct, *dBt, *dCt;             // of the chunk and the unit: [Q, N], and transposed
  float *CB, *E, *Et;                             // [Q, Q]
  float *x, *dv, *scaled, *xt, *dvt;              // of a head: [Q, P], and transposed
  float *M, *Y;                                   // of a head: [Q, Q]
  float *delta, *log_a, *steps;                   // of the heads: [heads, Q], the same, work
  float *weight, *dots_C, *dots_B, *columns, *crossing;   // of a head: [Q]
  float *G, *kept, *marks;                        // states of the heads: [heads], [span, heads], [spans, heads]
  double *dA, *dbias, *dD;                        // [heads], [heads], [heads, P]
  int64_t floats;                                 // in all

  Work(const Ssd& s, float* scratch) {
    const int64_t time = std::max<int64_t>(longest_sequence(s), 1), heads = most_heads(s);
    chunk = std::min(s.chunk ? s.chunk : kChunk, time);
    const int64_t chunks = ceil_div(time, chunk);
    tokens = whole_vectors(chunk);
    states = whole_vectors(s.states);
    width = whole_vectors(s.width);
    state_size = s.states * width;
    span = std::max<int64_t>(kKept / std::max<int64_t>(heads * state_size, 1), 1);
    while (span * span < chunks) ++span;
    span = std::min(span, chunks);
    Scratch m{scratch};
    for (float** p : {&B, &C}) *p = m.take(tokens * states);
    for (float** p : {&Bt, &Ct, &dBt, &dCt}) *p = m.take(s.states * tokens);
    for (float** p : {&CB, &E, &Et, &M, &Y}) *p = m.take(tokens * tokens);
    for (float** p : {&x, &dv, &scaled}) *p = m.take(tokens * width);
    for (float** p : {&xt, &dvt}) *p = m.take(width * tokens);
    for (float** p : {&delta, &log_a}) *p = m.take(heads * tokens);
    steps = m.take(2 * tokens * whole_vectors(heads));
    for (float** p : {&weight, &dots_C, &dots_B, &columns, &crossing}) *p = m.take(tokens);
    G = m.take(heads * state_size);
    kept = m.take(span * heads * state_size);
    marks = m.take(ceil_div(chunks, span) * heads * state_size);
    for (double** p : {&dA, &dbias}) *p = reinterpret_cast<double*>(m.take(2 * heads));
    dD = reinterpret_cast<double*>(m.take(2 * heads * width));
    floats = m.used;
  }
};

struct Chunk {
  int64_t begin, tokens;   // of the row; none: there is no such chunk
};

// One head of a unit in a chunk.
struct Place {
  const Unit& unit;
  Chunk chunk;
  int64_t i;               // of the unit's heads

  int64_t head() const { return unit.head + i; }
  int64_t at(const View& v, int64_t t = 0) const {
    return unit.row * v.stride[0] + (chunk.begin + t) * v.stride[1] + head() * v.stride[2];
  }
};

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
