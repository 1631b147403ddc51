// The gradient, chunk by chunk. The forward pass leaves nothing behind: the states before the chunks of a span are computed
// again and kept, then the span is walked back. Where there are several spans, a first pass leaves the state before each.
#include "ssd/backward_head.h"

namespace pyseq::PYSEQ_ISA {
namespace {

Chunk chunk_at(const Work& w, const Unit& unit, int64_t c) {
  const int64_t tokens = std::min(w.chunk, unit.tokens - c * w.chunk);
  return {unit.begin + c * w.chunk, tokens, round_up(tokens, W)};
}

void read_group(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, const View& from, float* to) {
  load_rows(from, at(from, unit, chunk.begin, unit.group), from.stride[1], chunk.tokens, chunk.padded, s.states, to,
            w.state_pitch);
}

// States before the chunks [first, last) of a span from the one before the first; `after`: also that after the last.
void advance(const Ssd& s, const Work& w, const Unit& unit, int64_t first, int64_t last, float* after) {
  const int64_t step = unit.heads * w.state_size;
  for (int64_t c = first; c < last; ++c) {
    float* const from = w.kept + (c - first) * step;
    float* const to = c + 1 < last ? from + step : after;
    if (!to) return;
    const Chunk chunk = chunk_at(w, unit, c);
    read_group(s, w, unit, chunk, s.B, w.B);
    for (int64_t i = 0; i < unit.heads; ++i) {
      const int64_t head = unit.head + i;
      Steps k = w.steps;
      read_steps(s, unit, chunk, head, k);
      load_rows(s.x, at(s.x, unit, chunk.begin, head), s.x.stride[1], chunk.tokens, chunk.tokens, s.width, w.x,
                w.width_pitch);
      scale_rows(w, chunk, w.x, k.weight);
      carry<false>(w, chunk, k.decay, from + i * w.state_size, w.B, to + i * w.state_size);
    }
  }
}

// The rows of dB or dC, added to by E, to the tensor or to the slab of this block.
void write_group(const Ssd& s, const Work& w, const Unit& unit, const Chunk& chunk, const float* sums, const View& to,
                 int64_t part) {
  float* const rows = w.C;   // no longer needed
  transposed(sums, w.token_pitch, w.states, chunk.padded, rows, w.state_pitch, chunk.padded, s.states);
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    const int64_t token = unit.row * s.time + chunk.begin + t;
    for (int64_t n = 0; n < s.states; n += W) {
      const vf v = load(rows + t * w.state_pitch + n);
      if (whole_groups(s)) store(to, at(to, unit, chunk.begin + t, unit.group) + n, v, s.states - n);
      else store(slab(s, unit.block, token, unit.group) + part * s.states + n, v, s.states - n);
    }
  }
}

void walk_chunk(const Ssd& s, Work& w, const Unit& unit, const Chunk& chunk, const float* S) {
  const int64_t pad = round_up(s.states, W);
  read_group(s, w, unit, chunk, s.B, w.B);
  read_group(s, w, unit, chunk, s.C, w.C);
  transposed(w.B, w.state_pitch, chunk.padded, s.states, w.Bt, w.token_pitch, pad, chunk.padded);
  transposed(w.C, w.state_pitch, chunk.padded, s.states, w.Ct, w.token_pitch, pad, chunk.padded);
  lower_product(chunk.padded, s.states, w.C, w.state_pitch, w.Bt, w.token_pitch, w.CB, w.token_pitch);
  std::fill_n(w.dBt, pad * w.token_pitch, 0.f);
  std::fill_n(w.dCt, pad * w.token_pitch, 0.f);
  std::fill_n(w.E, chunk.padded * w.token_pitch, 0.f);
  for (int64_t i = 0; i < unit.heads; ++i) {
    read_steps(s, unit, chunk, unit.head + i, w.steps);
    walk_head(s, w, unit, chunk, unit.head + i, S + i * w.state_size, w.G + i * w.state_size);
  }
  transposed(w.E, w.token_pitch, chunk.padded, chunk.padded, w.Et, w.token_pitch, chunk.padded, chunk.padded);
  add_product(w.states, chunk.padded, w.C, w.state_pitch, w.E, w.dBt, w.token_pitch,
              [&](int64_t j, int64_t) { return std::pair(j, chunk.tokens); });
  add_product(w.states, chunk.padded, w.B, w.state_pitch, w.Et, w.dCt, w.token_pitch,
              [&](int64_t, int64_t end) { return std::pair(int64_t(0), std::min(end, chunk.tokens)); });
  write_group(s, w, unit, chunk, w.dBt, s.dB, 0);
  write_group(s, w, unit, chunk, w.dCt, s.dC, 1);
}

void read_states(const Ssd& s, const Work& w, const Unit& unit, const float* from, float* to) {
  const int64_t size = s.width * s.states;
  for (int64_t i = 0; i < unit.heads; ++i) {
    float* const state = to + i * w.state_size;
    if (!from) std::fill_n(state, w.state_size, 0.f);
    else transposed(from + (unit.sequence * s.heads + unit.head + i) * size, s.states, s.width, s.states, state, w.width_pitch,
                    w.states, w.width);
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
    for (int64_t c = last - 1; c >= first; --c) walk_chunk(s, w, unit, chunk_at(w, unit, c), w.kept + (c - first) * step);
  }
  for (int64_t i = 0; s.dstate && i < unit.heads; ++i) {
    float* const to = s.dstate + (unit.sequence * s.heads + unit.head + i) * s.width * s.states;
    transposed(w.G + i * w.state_size, w.width_pitch, s.states, s.width, to, s.states, s.width, s.states);
  }
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
