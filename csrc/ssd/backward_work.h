// How the backward pass is dealt out: units, what they leave in the workspace, and what a thread works in.
#pragma once
#include <algorithm>

#include "ssd/kernel.h"
#include "ssd/tile.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kHeads = 6;     // in a block: dB and dC of a block are summed before they are written
constexpr int64_t kChunk = 64;
constexpr int64_t kSpan = 128;    // chunks of which the states are kept at a time, or the root of their number

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t blocks_of_heads(const Ssd& s) { return ceil_div(s.heads / s.groups, kHeads); }
inline int64_t chunk_of(const Ssd& s) { return std::min<int64_t>(s.chunk ? s.chunk : kChunk, std::max<int64_t>(s.time, 1)); }

// A unit: a sequence and a block of the heads of a group.
struct Unit {
  int64_t sequence, group, block;
  int64_t row, begin, tokens;     // of x
  int64_t head, heads;            // first, count

  Unit(const Ssd& s, int64_t unit) {
    const int64_t blocks = blocks_of_heads(s), per_group = s.heads / s.groups;
    block = unit % blocks;
    group = unit / blocks % s.groups;
    sequence = unit / blocks / s.groups;
    row = s.cu_seqlens ? 0 : sequence;
    begin = s.cu_seqlens ? s.cu_seqlens[sequence] : 0;
    tokens = s.cu_seqlens ? s.cu_seqlens[sequence + 1] - begin : s.time;
    head = group * per_group + per_group * block / blocks;
    heads = group * per_group + per_group * (block + 1) / blocks - head;
  }
};

// The workspace: dB and dC of every block, unless it is the only one of its group; dA, ddt_bias and dD of every sequence.
inline bool whole_groups(const Ssd& s) { return blocks_of_heads(s) == 1; }
inline int64_t slab_floats(const Ssd& s) {
  return whole_groups(s) ? 0 : round_up(blocks_of_heads(s) * s.batch * s.time * s.groups * 2 * s.states, 16);
}
inline float* slab(const Ssd& s, int64_t block, int64_t token, int64_t group) {   // [2, N]: dB, dC
  return s.workspace + ((block * s.batch * s.time + token) * s.groups + group) * 2 * s.states;
}
inline float* sums_A(const Ssd& s) { return s.workspace + slab_floats(s); }       // [S, H]
inline float* sums_bias(const Ssd& s) { return sums_A(s) + s.sequences * s.heads; }
inline float* sums_D(const Ssd& s) { return sums_bias(s) + s.sequences * s.heads; }   // [S, H, D_width]

// A piece of memory dealt out in cache lines; without a base it only counts.
struct Memory {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* const p = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return p;
  }
};

// The steps of one head in one chunk, [tokens]. The cumulative log decay L is high + low.
struct Steps {
  float *delta, *slope, *high, *low;      // slope: d delta / d dt
  float *from_start, *to_end, *weight;    // exp(L[i]), exp(L[Q] - L[i]), the same times delta
  float decay;                            // exp(L[Q])
  void take(Memory& m, int64_t tokens) {
    for (float** p : {&delta, &slope, &high, &low, &from_start, &to_end, &weight}) *p = m.take(tokens);
  }
};

// What a thread works in. Matrices have rows of whole vectors; a state is [N, P].
struct Work {
  int64_t chunk, span;                          // tokens in a chunk, chunks in a span
  int64_t tokens, states, width, state_size;    // floats from row to row of matrices over tokens, N and P; in a state
  float *B, *C, *Bt, *Ct, *dBt, *dCt;           // of the chunk, and of the block: [Q, N], and transposed
  float *CB, *E, *Et;                           // [Q, Q]
  float *x, *dv, *scaled, *xt, *dvt;            // of a head: [Q, P], and transposed
  float *M, *Y;                                 // of a head: [Q, Q]
  float* state;                                 // [P, N], as in the tensors
  float *dots_C, *dots_B, *columns, *crossing;  // of a head: [Q]
  Steps steps;
  float *G, *kept, *marks;                      // states of the block's heads: [heads], [span, heads], [spans, heads]
  double *dA, *dbias, *dD;                      // [heads], [heads], [heads, P]
  int64_t floats;                               // in all

  Work(const Ssd& s, float* scratch) {
    chunk = chunk_of(s);
    tokens = whole_vectors(chunk);
    states = whole_vectors(s.states);
    width = whole_vectors(s.width);
    state_size = s.states * width;
    const int64_t chunks = ceil_div(std::max<int64_t>(s.time, 1), chunk), heads = std::min(kHeads, s.heads / s.groups);
    span = kSpan;
    while (span * span < chunks) span *= 2;
    span = std::min(span, chunks);
    Memory m{scratch};
    for (float** p : {&B, &C}) *p = m.take(tokens * states);
    for (float** p : {&Bt, &Ct, &dBt, &dCt}) *p = m.take(s.states * tokens);
    for (float** p : {&CB, &E, &Et, &M, &Y}) *p = m.take(tokens * tokens);
    for (float** p : {&x, &dv, &scaled}) *p = m.take(tokens * width);
    for (float** p : {&xt, &dvt}) *p = m.take(width * tokens);
    state = m.take(s.width * states);
    for (float** p : {&dots_C, &dots_B, &columns, &crossing}) *p = m.take(tokens);
    steps.take(m, tokens);
    G = m.take(heads * state_size);
    kept = m.take(span * heads * state_size);
    marks = m.take(ceil_div(chunks, span) * heads * state_size);
    for (double** p : {&dA, &dbias}) *p = reinterpret_cast<double*>(m.take(2 * heads));
    dD = reinterpret_cast<double*>(m.take(2 * heads * width));
    floats = m.used;
  }
};

// Some tokens of a unit, at most a chunk.
struct Chunk {
  int64_t begin, tokens, padded;   // of the row, and up to whole vectors
};

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
