// The gradient, chunk by chunk. The forward pass leaves nothing behind: the states before the chunks of a span are
// computed again and kept, then the span is walked back. Where there are several spans, a first pass leaves the state
// before each.
#include "ssd/backward_head.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kPanel = 2 * W;   // columns of E between two of which the diagonal is cut

// Chunks before the first and behind the last have no tokens.
Chunk chunk_at(const Work& w, const Unit& u, int64_t c) {
  const int64_t begin = u.begin + c * w.chunk;
  return {begin, begin < u.begin ? 0 : std::clamp<int64_t>(u.end - begin, 0, w.chunk)};
}

void read_group(const Ssd& s, const Unit& u, const Chunk& chunk, const View& from, float* to) {
  const int64_t at = u.row * from.stride[0] + chunk.begin * from.stride[1] + u.group * from.stride[2];
  load_rows(to, from, at, from.stride[1], chunk.tokens, s.states);
}

void read_chunk(const Ssd& s, const Work& w, const Unit& u, const Chunk& chunk) {
  read_group(s, u, chunk, s.B, w.B);
  load_steps(s, u, chunk.begin, chunk.tokens, w.delta, w.log_a, w.tokens, w.steps);
}

// What is taken after a head: the next one, or the first in the chunk that follows.
Place after(const Unit& u, const Chunk& chunk, const Chunk& following, int64_t i) {
  return i + 1 < u.heads ? Place{u, chunk, i + 1} : Place{u, following, 0};
}

// States before the chunks [first, last) of a span from the one before the first; `end`: also that after the last.
void advance(const Ssd& s, const Work& w, const Unit& u, int64_t first, int64_t last, float* end) {
  const int64_t step = u.heads * w.state_size;
  for (int64_t c = first; c < last; ++c) {
    float* const from = w.kept + (c - first) * step;
    float* const to = c + 1 < last ? from + step : end;
    if (!to) return;
    const Chunk chunk = chunk_at(w, u, c);
    const int64_t tokens = chunk.tokens;
    read_chunk(s, w, u, chunk);
    for (int64_t i = 0; i < u.heads; ++i) {
      const Place here{u, chunk, i}, next = after(u, chunk, chunk_at(w, u, c + 1), i);
      const Decays decays(w.log_a + i * w.tokens, tokens);
      load_rows(w.x, s.x, here.at(s.x), s.x.stride[1], tokens, s.width);
      weigh_tokens(w, decays, w.delta + i * w.tokens);
      scale_tokens(w, tokens, w.x, w.weight);
      const auto fetch = [&](int64_t n, int64_t p, int R, int C) {   // a part of the next head's x for every tile
        const int64_t t = n * next.chunk.tokens / s.states, t_end = (n + R) * next.chunk.tokens / s.states;
        prefetch<0>(s.x, next.at(s.x, t) + p, t_end - t, C * W);
      };
      const int64_t state = i * w.state_size;
      carry<false>(s, w, decays, from + state, w.B, to + state, nullptr, fetch);
    }
  }
}

// total[n][t] += sum over k in [from, to) of left[k][n] right[k][t], for t in [first, last)
void add_product(const Ssd& s, const Work& w, int64_t first, int64_t last, int64_t from, int64_t to, const float* left,
                 const float* right, float* total) {
  for_tiles(s.states, last - first, [&]<int R, int C>(int64_t n, int64_t t) {
    vf sum[R][C];
    float* const tile = total + n * w.tokens + first + t;
    load_tile(sum, tile, w.tokens);
    multiply(sum, left + from * w.states + n, 1, w.states, right + from * w.tokens + first + t, w.tokens, to - from);
    store_tile(tile, w.tokens, sum);
  });
}

// The rows of dB or dC, to the tensor or to the slab of this block.
void write_group(const Ssd& s, const Work& w, const Unit& u, const Chunk& chunk, const float* sums, const View& to,
                 int64_t part) {
  float* const rows = w.C;   // no longer needed
  transpose_rows(rows, w.states, sums, w.tokens, s.states, chunk.tokens);
  const int64_t block = block_of(s, u);
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int64_t at = u.row * to.stride[0] + (chunk.begin + t) * to.stride[1] + u.group * to.stride[2];
    const int64_t token = u.row * s.time + chunk.begin + t;
    for (int64_t n = 0; n < s.states; n += W) {
      const vf v = load(rows + t * w.states + n);
      if (whole_groups(s)) store(to, at + n, v, s.states - n);
      else store(slab(s, block, token, u.group) + part * s.states + n, v, s.states - n);
    }
  }
}

void walk_chunk(const Ssd& s, const Work& w, const Unit& u, const Chunk& chunk, const Chunk& following,
                const float* S) {
  read_chunk(s, w, u, chunk);
  read_group(s, u, chunk, s.C, w.C);
  transpose_rows(w.Bt, w.tokens, w.B, w.states, chunk.tokens, s.states);
  transpose_rows(w.Ct, w.tokens, w.C, w.states, chunk.tokens, s.states);
  lower_product(w, chunk.tokens, w.C, w.states, w.Bt, s.states, w.CB);
  std::fill_n(w.dBt, s.states * w.tokens, 0.f);
  std::fill_n(w.dCt, s.states * w.tokens, 0.f);
  std::fill_n(w.E, chunk.tokens * w.tokens, 0.f);
  for (int64_t i = 0; i < u.heads; ++i) {
    const int64_t state = i * w.state_size;
    walk_head(s, w, {u, chunk, i}, after(u, chunk, following, i), S + state, w.G + state);
  }
  transpose_rows(w.Et, w.tokens, w.E, w.tokens, chunk.tokens, chunk.tokens);
  for (int64_t t = 0; t < chunk.tokens; t += kPanel) {
    const int64_t end = std::min(t + kPanel, chunk.tokens);
    add_product(s, w, t, end, t, chunk.tokens, w.C, w.E, w.dBt);
    add_product(s, w, t, end, 0, end, w.B, w.Et, w.dCt);
  }
  write_group(s, w, u, chunk, w.dBt, s.dB, 0);
  write_group(s, w, u, chunk, w.dCt, s.dC, 1);
}

int64_t state_at(const Ssd& s, const Unit& u, int64_t i) {
  return (u.sequence * s.heads + u.head + i) * s.width * s.states;
}

void read_states(const Ssd& s, const Work& w, const Unit& u, const float* from, float* to) {
  for (int64_t i = 0; i < u.heads; ++i) {
    float* const state = to + i * w.state_size;
    if (from) transpose_rows(state, w.width, from + state_at(s, u, i), s.states, s.width, s.states);
    else std::fill_n(state, w.state_size, 0.f);
  }
}

void write_sums(const Ssd& s, const Work& w, const Unit& u) {
  for (int64_t i = 0; i < u.heads; ++i) {
    const int64_t head = u.head + i, at = u.sequence * s.heads + head;
    const double good = s.A[head] <= 0.f || u.begin == u.end ? 1 : NAN;
    sums_A(s)[at] = float(w.dA[i]);
    sums_bias(s)[at] = float(w.dbias[i]);
    float* const dD = sums_D(s) + at * s.D_width;
    double total = 0;
    for (int64_t p = 0; p < s.width; ++p) {
      const double sum = good * w.dD[i * w.width + p];
      if (s.D_width > 1) dD[p] = float(sum);
      total += sum;
    }
    if (s.D_width == 1) dD[0] = float(total);
  }
}

void walk(const Ssd& s, const Unit& u) {
  const Work w(s, s.scratch);
  std::fill_n(w.dA, u.heads, 0.);
  std::fill_n(w.dbias, u.heads, 0.);
  std::fill_n(w.dD, u.heads * w.width, 0.);
  read_states(s, w, u, s.dstate_out, w.G);
  read_states(s, w, u, s.state, w.marks);
  const int64_t chunks = ceil_div(u.end - u.begin, w.chunk), spans = ceil_div(chunks, w.span);
  const int64_t step = u.heads * w.state_size;
  for (int64_t k = 0; k < spans; ++k) {
    float* const mark = w.marks + k * step;
    std::copy_n(mark, step, w.kept);
    advance(s, w, u, k * w.span, std::min((k + 1) * w.span, chunks), k + 1 < spans ? mark + step : nullptr);
  }
  for (int64_t k = spans - 1; k >= 0; --k) {
    const int64_t first = k * w.span, last = std::min(first + w.span, chunks);
    if (k + 1 < spans) {
      std::copy_n(w.marks + k * step, step, w.kept);
      advance(s, w, u, first, last, nullptr);
    }
    for (int64_t c = last - 1; c >= first; --c) {
      walk_chunk(s, w, u, chunk_at(w, u, c), chunk_at(w, u, c - 1), w.kept + (c - first) * step);
    }
  }
  for (int64_t i = 0; s.dstate && i < u.heads; ++i) {
    transpose_rows(s.dstate + state_at(s, u, i), s.states, w.G + i * w.state_size, w.width, s.states, s.width);
  }
  write_sums(s, w, u);
}

}  // namespace

int64_t ssd_backward_units(const Ssd& s) { return s.sequences * s.groups * blocks(s); }
int64_t ssd_backward_scratch(const Ssd& s) { return Work(s, nullptr).floats; }
int64_t ssd_backward_workspace(const Ssd& s) { return slab_floats(s) + s.sequences * s.heads * (2 + s.D_width); }

void ssd_backward(const Ssd& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) walk(s, unit_at(s, most_heads(s), unit));
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
