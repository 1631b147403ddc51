// A chunk of a sequence in the scratch of a thread: its tokens as float32 matrices, and the decays between them.
#pragma once
#include "cpu/tile.h"
#include "ssd/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kMostTokens = 256;   // of a chunk

// Where things of a unit lie: `from` is null while their sizes are counted.
struct Scratch {
  float* from;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* const p = from ? from + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return p;
  }
};

// Some heads of one group of one sequence.
struct Unit {
  int64_t sequence, row, begin, end;   // tokens [begin, end) of a row of the batch
  int64_t group, head, heads;
};

// Units of up to `most` heads. Those of all sequences lie side by side: threads share long sequences evenly.
inline int64_t blocks_of_group(const Ssd& s, int64_t most) { return (s.heads / s.groups + most - 1) / most; }
inline Unit unit_at(const Ssd& s, int64_t most, int64_t unit) {
  const int64_t q = unit % s.sequences, per_group = s.heads / s.groups, blocks = blocks_of_group(s, most);
  const int64_t group = unit / s.sequences / blocks, block = unit / s.sequences % blocks;
  const int64_t first = per_group * block / blocks, last = per_group * (block + 1) / blocks;
  const bool packed = s.cu_seqlens;
  return {q,     packed ? 0 : q, packed ? s.cu_seqlens[q] : 0,   packed ? s.cu_seqlens[q + 1] : s.time,
          group, group * per_group + first, last - first};
}

// delta and log decay of the tokens [begin, begin + tokens) for the heads of a unit: [heads, width] with zeros behind.
// work: 2 tokens whole_vectors(heads) floats
inline void load_steps(const Ssd& s, const Unit& u, int64_t begin, int64_t tokens, float* delta, float* log_a,
                       int64_t width, float* work) {
  const int64_t across = whole_vectors(u.heads);
  float* const logs = work + tokens * across;
  for (int64_t h = 0; h < u.heads; h += W) {
    const int64_t lanes = u.heads - h;
    const vf A = load(s.A + u.head + h, lanes), bias = s.dt_bias ? load(s.dt_bias + u.head + h, lanes) : vf{};
    for (int64_t t = 0; t < tokens; ++t) {
      const vf dt = load(s.dt, u.row * s.dt.stride[0] + (begin + t) * s.dt.stride[1] + u.head + h, lanes);
      const vf d = step_size(s, dt, bias);
      store(work + t * across + h, d);
      store(logs + t * across + h, log_decay(d, A));
    }
  }
  transpose_rows(delta, width, work, across, tokens, u.heads);
  transpose_rows(log_a, width, logs, across, tokens, u.heads);
}

// Brings rows of a tensor towards the core: they lie too far apart for the machine to see them coming.
template <int write> inline void prefetch(const View& v, int64_t at, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* const row = static_cast<const char*>(v.at(at + r * v.stride[1]));
    for (int64_t i = 0; i < columns * size_of(v.type); i += 64) __builtin_prefetch(row + i, write, write ? 3 : 2);
  }
}

inline vf narrow(const double* from, double scale, double shift) {   // W of scale * from + shift
  alignas(64) float to[W];
  for (int i = 0; i < W; ++i) to[i] = float(scale * from[i] + shift);
  return load(to);
}

// The decays of one head over a chunk.
struct Decays {
  int64_t tokens;
  alignas(64) double L[kMostTokens + W];        // sums of log decays, up to and with a token; zeros behind
  alignas(64) float a[kMostTokens + W];         // of a token
  alignas(64) float before[kMostTokens + W];    // exp(L[t]): from before the chunk to token t
  alignas(64) float after[kMostTokens + W];     // exp(L[Q] - L[t]): from token t to the end

  Decays(const float* log_a, int64_t n) : tokens(n) {
    double sum = 0;
    for (int64_t t = 0; t < n; ++t) L[t] = sum += double(log_a[t]);
    for (int64_t t = n; t < n + W; ++t) L[t] = sum;
    for (int64_t t = 0; t < n; t += W) {
      store(a + t, exp(load(log_a + t)));
      store(before + t, exp(narrow(L + t, 1, 0)));
      store(after + t, exp(narrow(L + t, -1, sum)));
    }
  }

  // What the chunk leaves of a state: see update.h.
  bool slow() const { return L[tokens - 1] > kSlow; }
  vf whole() const { return decay_of(splat(float(L[tokens - 1]))); }
};

// M[i][j] = scores[i][j] exp(L[i] - L[j]) delta[j] for j <= i, rows `width` apart. Within W tokens the decays are
// products of those of single tokens; further back they are split where the W tokens begin, into two factors <= 1.
inline void weigh(const Decays& d, const float* scores, const float* delta, float* M, int64_t width) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t i = 0; i < d.tokens; i += W) {
    const int64_t rows = d.tokens - i < W ? d.tokens - i : W;
    const double start = i ? d.L[i - 1] : 0;
    alignas(64) float near[W];
    store(near, exp(narrow(d.L + i, 1, -start)));
    for (int64_t j = 0; j < i; j += W) {
      const vf far = exp(narrow(d.L + j, -1, start)) * load(delta + j);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (i + r) * width + j;
        store(M + at, load(scores + at) * (splat(near[r]) * far));
      }
    }
    vf decay{};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * width + i;
      decay = select(lane == int32_t(r), splat(1.f), decay * splat(d.a[i + r]));
      store(M + at, load(scores + at) * (decay * load(delta + i)));
    }
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
