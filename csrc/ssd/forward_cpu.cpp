#include <algorithm>

#include "ssd/chunk.h"
#include "ssd/forward_exact.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kMostHeads = 16;           // of a unit: they share <C, B> of a chunk
constexpr int64_t kMostState = 128 * 1024;   // floats: the states of a unit stay in the second-level cache

int64_t heads_of_unit(const Ssd& s) {
  int64_t best = 1;
  double least = 1e300;
  const int64_t room = kMostState / (s.states * whole_vectors(s.width));
  for (int64_t heads = 1; heads <= std::clamp<int64_t>(room, 1, kMostHeads); ++heads) {
    const int64_t units = s.sequences * s.groups * blocks_of_group(s, heads);
    const double cost = double((units + s.threads - 1) / s.threads) * (double(heads) + 0.3);   // 0.3: <C, B>
    if (cost <= least) least = cost, best = heads;
  }
  return best;
}

int64_t chunk_of(const Ssd& s) { return s.chunk ? s.chunk : 64; }

// What a unit keeps, and one chunk of it. Widths are whole vectors.
struct Chunk {
  int64_t tokens_width, states_width, width;
  float* S;                        // [heads, N, width]: transposed, so that the channels are the lanes
  float *B, *C, *Bt;               // [Q, states_width], the same, [N, tokens_width]
  float *scores, *M;               // [Q, tokens_width]: <C, B>, and what x is multiplied by
  float* x;                        // [Q, width]
  float *delta, *log_a, *steps;    // [heads, tokens_width], the same, work
  float* y;                        // a tile
  int64_t size;

  Chunk(const Ssd& s, float* scratch) {
    Scratch from{scratch};
    const int64_t Q = chunk_of(s), heads = heads_of_unit(s);
    tokens_width = whole_vectors(Q), states_width = whole_vectors(s.states), width = whole_vectors(s.width);
    S = from.take(heads * s.states * width);
    B = from.take(Q * states_width);
    C = from.take(Q * states_width);
    Bt = from.take(s.states * tokens_width);
    scores = from.take(Q * tokens_width);
    M = from.take(Q * tokens_width);
    x = from.take(Q * width);
    delta = from.take(heads * tokens_width);
    log_a = from.take(heads * tokens_width);
    steps = from.take(2 * Q * whole_vectors(heads));
    y = from.take(kTileRows * kTileVectors * W);
    size = from.used;
  }
};

void load_chunk(const Ssd& s, const Unit& u, const Chunk& c, int64_t begin, int64_t tokens) {
  const auto at = [&](const View& v) { return u.row * v.stride[0] + begin * v.stride[1] + u.group * v.stride[2]; };
  load_rows(c.B, s.B, at(s.B), s.B.stride[1], tokens, s.states);
  load_rows(c.C, s.C, at(s.C), s.C.stride[1], tokens, s.states);
  transpose_rows(c.Bt, c.tokens_width, c.B, c.states_width, tokens, s.states);
  for_tiles(tokens, tokens, [&]<int R, int K>(int64_t i, int64_t j) {
    if (j >= i + R) return;
    vf sum[R][K] = {};
    multiply(sum, c.C + i * c.states_width, c.states_width, 1, c.Bt + j, c.tokens_width, s.states);
    store_tile(c.scores + i * c.tokens_width + j, c.tokens_width, sum);
  });
  load_steps(s, u, begin, tokens, c.delta, c.log_a, c.tokens_width, c.steps);
}

// Brings rows of a tensor towards the core: they lie too far apart for the machine to see them coming.
template <int write> void prefetch(const View& v, int64_t at, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* const row = static_cast<const char*>(v.at(at + r * v.stride[1]));
    for (int64_t byte = 0; byte < columns * size_of(v.type); byte += 64) __builtin_prefetch(row + byte, write, write ? 3 : 2);
  }
}

// A tile of y, [rows, columns]: skip, gate, and the one rounding.
void finish(const Ssd& s, const Chunk& c, int64_t row, int64_t begin, int64_t head, int64_t i, int64_t rows,
            int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = [&](const View& v) { return row * v.stride[0] + (begin + i + r) * v.stride[1] + head * v.stride[2]; };
    const int64_t y = at(s.y), z = at(s.z);
    for (int64_t p = column; p < column + columns && p < s.width; p += W) {
      const vf v = load(c.y + r * columns + p - column), x = load(c.x + (i + r) * c.width + p);
      store(s.y, y + p, output(s, v, x, z + p, head, p), s.width - p);
    }
  }
}

// One head of a chunk. `started`: S holds a state, not zeros; `further`: the state after the chunk is wanted.
void advance(const Ssd& s, const Unit& u, const Chunk& c, int64_t begin, int64_t tokens, int64_t h, bool started,
             bool further) {
  const int64_t head = u.head + h;
  float* const S = c.S + h * s.states * c.width;
  const float* const delta = c.delta + h * c.tokens_width;
  const Decays decay(c.log_a + h * c.tokens_width, tokens);
  weigh(decay, c.scores, delta, c.M, c.tokens_width);
  const int64_t x = u.row * s.x.stride[0] + begin * s.x.stride[1] + head * s.x.stride[2];
  load_rows(c.x, s.x, x, s.x.stride[1], tokens, s.width);
  const int64_t next = h + 1 < u.heads ? x + s.x.stride[2] : x + tokens * s.x.stride[1] - h * s.x.stride[2];
  const int64_t y = u.row * s.y.stride[0] + begin * s.y.stride[1] + head * s.y.stride[2];
  for_tiles(tokens, s.width, [&]<int R, int K>(int64_t i, int64_t p) {
    prefetch<0>(s.x, next + i * s.x.stride[1] + p, R, K * W);
    prefetch<1>(s.y, y + i * s.y.stride[1] + p, R, K * W);
    vf sum[R][K] = {};
    if (started) multiply(sum, c.C + i * c.states_width, c.states_width, 1, S + p, c.width, s.states);
    scale_rows(sum, decay.before + i);   // also 0: NaN where A is not <= 0
    const float* const M = c.M + i * c.tokens_width;
    multiply(sum, M, c.tokens_width, 1, c.x + p, c.width, i);
    multiply_lower(sum, M + i, c.tokens_width, 1, c.x + i * c.width + p, c.width);
    store_tile(c.y, K * W, sum);
    finish(s, c, u.row, begin, head, i, R, p, K * W);
  });
  if (!further) return;
  for (int64_t t = 0; t < tokens; ++t) {
    const vf weight = splat(decay.after[t] * delta[t]);
    for (int64_t p = 0; p < c.width; p += W) store(c.x + t * c.width + p, load(c.x + t * c.width + p) * weight);
  }
  const vf whole = splat(decay.before[tokens - 1]);
  for_tiles(s.states, s.width, [&]<int R, int K>(int64_t n, int64_t p) {
    vf sum[R][K] = {};
    if (started) load_tile(sum, S + n * c.width + p, c.width);
    for (auto& r : sum) for (vf& v : r) v *= whole;
    multiply(sum, c.B + n, 1, c.states_width, c.x + p, c.width, tokens);
    store_tile(S + n * c.width + p, c.width, sum);
  });
}

void forward_unit(const Ssd& s, const Unit& u, const Chunk& c) {
  const int64_t size = s.width * s.states, first = (u.sequence * s.heads + u.head) * size, Q = chunk_of(s);
  const int64_t kept = s.states * c.width;
  bool started = s.state;
  for (int64_t h = 0; s.state && h < u.heads; ++h) {
    transpose_rows(c.S + h * kept, c.width, s.state + first + h * size, s.states, s.width, s.states);
  }
  for (int64_t t = u.begin; t < u.end; t += Q) {
    const int64_t tokens = std::min(Q, u.end - t);
    load_chunk(s, u, c, t, tokens);
    for (int64_t h = 0; h < u.heads; ++h) advance(s, u, c, t, tokens, h, started, t + Q < u.end || s.state_out);
    started = true;
  }
  for (int64_t h = 0; s.state_out && h < u.heads; ++h) {
    float* const to = s.state_out + first + h * size;
    if (started) transpose_rows(to, s.states, c.S + h * kept, c.width, s.states, s.width);
    else std::fill_n(to, size, 0.f);
  }
}

}  // namespace

int64_t ssd_forward_units(const Ssd& s) {
  return s.exact ? s.sequences * s.heads : s.sequences * s.groups * blocks_of_group(s, heads_of_unit(s));
}
int64_t ssd_forward_scratch(const Ssd& s) { return s.exact ? Block::size(s) : Chunk(s, nullptr).size; }

void ssd_forward(const Ssd& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  if (s.exact) {
    for (int64_t unit = begin; unit < end; ++unit) forward_exactly(s, unit);
  } else {
    const Chunk chunk(s, s.scratch);
    const int64_t most = heads_of_unit(s);
    for (int64_t unit = begin; unit < end; ++unit) forward_unit(s, unit_at(s, most, unit), chunk);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
