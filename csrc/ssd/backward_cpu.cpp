// The gradient, chunk by chunk. The forward pass leaves nothing behind: the states before the chunks of a span are computed
// again and kept, then the span is walked back. Where there are several spans, a first pass leaves the state before each.
#include "ssd/backward_head.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kPanel = 2 * W;   // columns of E between two of which the diagonal is cut

Chunk chunk_at(const Work& w, const Unit& unit, int64_t c) {
  const int64_t tokens = c < 0 ? 0 : std::min(w.chunk, unit.tokens - c * w.chunk);   // of the next one there may be none
  return {unit.begin + c * w.chunk, tokens, whole_vectors(tokens)};
}

int64_t state_at(const Ssd& s, const Unit& unit, int64_t i) {
  return (unit.sequence * s.heads + unit.head + i) * s.width * s.states;
}

void read_group(const Ssd& s, const Unit& unit, const Chunk& chunk, const View& from, float* to) {
  load_rows(to, from, at(from, unit, chunk.begin, unit.group), from.stride[1], chunk.tokens, s.states);
}

// States before the chunks [first, last) of a span from the one before the first; `after`: also that after the last.
void advance(const Ssd& s, const Work& w, const Unit& unit, int64_t first, int64_t last, float* after) {
  const int64_t step = unit.heads * w.state_size;
  for (int64_t c = first; c < last; ++c) {
    float* const from = w.kept + (c - first) * step;
    float* const to = c + 1 < last ? from + step : after;
    if (!to) return;
    const Chunk chunk = chunk_at(w, unit, c);
    read_group(s, unit, chunk, s.B, w.B);
    for (int64_t i = 0; i < unit.heads; ++i) {
      const int64_t head = unit.head + i;
      Steps k = w.steps;
      read_steps(s, unit, chunk, head, k);
      load_rows(w.x, s.x, at(s.x, unit, chunk.begin, head), s.x.stride[1], chunk.tokens, s.width);
      scale_tokens(w, chunk, w.x, k.weight);
      Ahead rows = ahead(s, unit, chunk, chunk_at(w, unit, c + 1), head, {&s.x});
      carry<false>(s, w, chunk, k.decay, from + i * w.state_size, w.B, to + i * w.state_size, nullptr, rows);
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

// The rows of dB or dC, added to by E, to the tensor or to the slab of this block.
void write_group(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, const float* sums, const View& to,
                 int64_t part) {
  float* const rows = w.C;   // no longer needed
  transpose_rows(rows, w.states, sums, w.tokens, s.states, chunk.tokens);
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int64_t token = unit.row * s.time + chunk.begin + t;
    for (int64_t n = 0; n < s.states; n += W) {
      const vf v = load(rows + t * w.states + n);
      if (whole_groups(s)) store(to, at(to, unit, chunk.begin + t, unit.group) + n, v, s.states - n);
      else store(slab(s, unit.block, token, unit.group) + part * s.states + n, v, s.states - n);
    }
  }
}

void walk_chunk(const Ssd& s, Work& w, const Unit& unit, const Chunk& chunk, const Chunk& next, const float* S) {
  read_group(s, unit, chunk, s.B, w.B);
  read_group(s, unit, chunk, s.C, w.C);
  transpose_rows(w.Bt, w.tokens, w.B, w.states, chunk.tokens, s.states);
  transpose_rows(w.Ct, w.tokens, w.C, w.states, chunk.tokens, s.states);
  lower_product(w, chunk, w.C, w.states, w.Bt, s.states, w.CB);
  std::fill_n(w.dBt, s.states * w.tokens, 0.f);
  std::fill_n(w.dCt, s.states * w.tokens, 0.f);
  std::fill_n(w.E, chunk.tokens * w.tokens, 0.f);
  for (int64_t i = 0; i < unit.heads; ++i) {
    read_steps(s, unit, chunk, unit.head + i, w.steps);
    walk_head(s, w, unit, chunk, unit.head + i, S + i * w.state_size, w.G + i * w.state_size,
              ahead(s, unit, chunk, next, unit.head + i, {&s.x, &s.dy, &s.dx, &s.z, &s.ungated, &s.dz}));
  }
  transpose_rows(w.Et, w.tokens, w.E, w.tokens, chunk.tokens, chunk.tokens);
  for (int64_t t = 0; t < chunk.tokens; t += kPanel) {
    const int64_t end = std::min(t + kPanel, chunk.tokens);
    add_product(s, w, t, end, t, chunk.tokens, w.C, w.E, w.dBt);
    add_product(s, w, t, end, 0, end, w.B, w.Et, w.dCt);
  }
  write_group(s, w, unit, chunk, w.dBt, s.dB, 0);
  write_group(s, w, unit, chunk, w.dCt, s.dC, 1);
}

void read_states(const Ssd& s, const Work& w, const Unit& unit, const float* from, float* to) {
  for (int64_t i = 0; i < unit.heads; ++i) {
    float* const state = to + i * w.state_size;
    if (!from) {
      std::fill_n(state, w.state_size, 0.f);
    } else {
      load_rows(w.state, from + state_at(s, unit, i), s.states, s.width, s.states);
      transpose_rows(state, w.width, w.state, w.states, s.width, s.states);
    }
  }
}

void write_states(const Ssd& s, const Work& w, const Unit& unit, const float* from, float* to) {
  for (int64_t i = 0; i < unit.heads; ++i) {
    transpose_rows(w.state, w.states, from + i * w.state_size, w.width, s.states, s.width);
    for (int64_t p = 0; p < s.width; ++p) {
      std::copy_n(w.state + p * w.states, s.states, to + state_at(s, unit, i) + p * s.states);
    }
  }
}

void write_sums(const Ssd& s, const Work& w, const Unit& unit) {
  for (int64_t i = 0; i < unit.heads; ++i) {
    const int64_t head = unit.head + i, at = unit.sequence * s.heads + head;
    const double good = s.A[head] <= 0.f || unit.tokens == 0 ? 1 : NAN;
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

void walk(const Ssd& s, const Unit& unit) {
  Work w(s, s.scratch);
  std::fill_n(w.dA, unit.heads, 0.);
  std::fill_n(w.dbias, unit.heads, 0.);
  std::fill_n(w.dD, unit.heads * w.width, 0.);
  read_states(s, w, unit, s.dstate_out, w.G);
  const int64_t chunks = ceil_div(unit.tokens, w.chunk), spans = ceil_div(chunks, w.span), step = unit.heads * w.state_size;
  read_states(s, w, unit, s.state, w.marks);
  for (int64_t k = 0; k < spans; ++k) {
    std::copy_n(w.marks + k * step, step, w.kept);
    advance(s, w, unit, k * w.span, std::min((k + 1) * w.span, chunks), k + 1 < spans ? w.marks + (k + 1) * step : nullptr);
  }
  for (int64_t k = spans - 1; k >= 0; --k) {
    const int64_t first = k * w.span, last = std::min(first + w.span, chunks);
    if (k + 1 < spans) {
      std::copy_n(w.marks + k * step, step, w.kept);
      advance(s, w, unit, first, last, nullptr);
    }
    for (int64_t c = last - 1; c >= first; --c) {
      walk_chunk(s, w, unit, chunk_at(w, unit, c), chunk_at(w, unit, c - 1), w.kept + (c - first) * step);
    }
  }
  if (s.dstate) write_states(s, w, unit, w.G, s.dstate);
  write_sums(s, w, unit);
}

}  // namespace

int64_t ssd_backward_units(const Ssd& s) { return s.sequences * s.groups * blocks_of_heads(s); }
int64_t ssd_backward_scratch(const Ssd& s) { return Work(s, nullptr).floats; }
int64_t ssd_backward_workspace(const Ssd& s) { return slab_floats(s) + s.sequences * s.heads * (2 + s.D_width); }

void ssd_backward(const Ssd& s, int64_t begin, int64_t end) {
  const unsigned mode = flush_denormals();
  for (int64_t unit = begin; unit < end; ++unit) walk(s, Unit(s, unit));
  restore_denormals(mode);
}

}  // namespace pyseq::PYSEQ_ISA
