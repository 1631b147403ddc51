#include <algorithm>
#include <type_traits>

#include "ssd/forward_chunk.h"
#include "ssd/forward_exact.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// A tile of y, [rows, columns]: skip, gate, and the one rounding.
void finish(const Ssd& s, const Chunk& c, int64_t row, int64_t begin, int64_t head, int64_t i, int64_t rows,
            int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = begin + i + r;
    const auto at = [&](const View& v) { return row * v.stride[0] + t * v.stride[1] + head * v.stride[2]; };
    const int64_t y = at(s.y), z = at(s.z);
    for (int64_t p = column; p < column + columns && p < s.width; p += W) {
      const vf v = load(c.y + r * columns + p - column), x = load(c.x + (i + r) * c.width + p);
      store(s.y, y + p, output(s, v, x, z + p, head, p), s.width - p);
    }
  }
}

// One head of a chunk. `started`: S holds a state, not zeros; `further`: the state after the chunk is wanted.
template <class P>
void advance(const Ssd& s, const Unit& u, const Chunk& c, int64_t begin, int64_t tokens, int64_t h, bool started,
             bool further) {
  const int64_t head = u.head + h;
  float* const S = c.S + h * s.states * c.width;
  const float* const delta = c.delta + h * c.tokens_width;
  const Decays decay(c.log_a + h * c.tokens_width, tokens);
  weigh(decay, c.scores, delta, c.M, c.tokens_width);
  const int64_t x = u.row * s.x.stride[0] + begin * s.x.stride[1] + head * s.x.stride[2];
  load_rows(c.x, s.x, x, s.x.stride[1], tokens, s.width);
#if defined(__AVX512F__)
  if (std::is_same_v<P, Pairs> && started) pair_states(s, c, S);
#endif
  const int64_t next = h + 1 < u.heads ? x + s.x.stride[2] : x + tokens * s.x.stride[1] - h * s.x.stride[2];
  const int64_t y = u.row * s.y.stride[0] + begin * s.y.stride[1] + head * s.y.stride[2];
  for_tiles(tokens, s.width, [&]<int R, int K>(int64_t i, int64_t p) {
    prefetch<0>(s.x, next + i * s.x.stride[1] + p, R, K * W);
    prefetch<1>(s.y, y + i * s.y.stride[1] + p, R, K * W);
    vf sum[R][K] = {};
    if (started) multiply_state<P>(sum, s, c, S, i, p);
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
  const vf whole = decay.whole();
  const bool slow = decay.slow();
  for_tiles(s.states, s.width, [&]<int R, int K>(int64_t n, int64_t p) {
    vf sum[R][K] = {};
    if (started) load_tile(sum, S + n * c.width + p, c.width);
    for (auto& r : sum) for (vf& v : r) v = slow ? decayed<true>(whole, v) : decayed<false>(whole, v);
    multiply(sum, c.B + n, 1, c.states_width, c.x + p, c.width, tokens);
    store_tile(S + n * c.width + p, c.width, sum);
  });
}

template <class P> void forward_unit(const Ssd& s, const Unit& u, const Chunk& c) {
  const int64_t size = s.width * s.states, first = (u.sequence * s.heads + u.head) * size, Q = chunk_of(s);
  const int64_t kept = s.states * c.width;
  bool started = s.state;
  for (int64_t h = 0; s.state && h < u.heads; ++h) {
    transpose_rows(c.S + h * kept, c.width, s.state + first + h * size, s.states, s.width, s.states);
  }
  for (int64_t t = u.begin; t < u.end; t += Q) {
    const int64_t tokens = std::min(Q, u.end - t);
    load_chunk<P>(s, u, c, t, tokens);
    for (int64_t h = 0; h < u.heads; ++h) advance<P>(s, u, c, t, tokens, h, started, t + Q < u.end || s.state_out);
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
    auto forward = forward_unit<Singles>;
#if defined(__AVX512F__)
    if (in_pairs(s)) forward = forward_unit<Pairs>;
#endif
    for (int64_t unit = begin; unit < end; ++unit) forward(s, unit_at(s, most, unit), chunk);
  }
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
