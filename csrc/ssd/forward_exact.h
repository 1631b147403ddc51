// The forward token by token, in the arithmetic of the step. Some channels and states at a time stay in registers while
// some tokens pass; how many is no matter to the bits, as every state and every sum has an order of its own.
#pragma once
#include <algorithm>

#include "cpu/tile.h"
#include "ssd/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kBlock = 32;                  // tokens in the first-level cache
constexpr int kStates = W == 16 ? 4 : 2;        // vectors of states in registers, of four channels

struct Block {
  int64_t states_width, width;   // whole vectors of N and P
  float *S, *B, *C;              // [width, states_width]; [tokens, states_width] twice
  float *x, *dx;                 // [tokens, width]
  float *total, *parts;          // [tokens, 4, W]: of four channels, so far; [tokens, width / 4, W]: their sum4
  float decay[kBlock], delta[kBlock];
  int32_t slow[kBlock];

  static int64_t size(const Ssd& s) {
    const int64_t n = whole_vectors(s.states), p = whole_vectors(s.width);
    return p * n + kBlock * (2 * n + 2 * p + 4 * W + p / 4 * W);
  }
  explicit Block(const Ssd& s) : states_width(whole_vectors(s.states)), width(whole_vectors(s.width)) {
    S = s.scratch;
    B = S + width * states_width;
    C = B + kBlock * states_width;
    x = C + kBlock * states_width;
    dx = x + kBlock * width;
    total = dx + kBlock * width;
    parts = total + kBlock * 4 * W;
  }
};

template <bool slow, int K>
[[gnu::always_inline]] inline void take_token(vf (&S)[4][K], vf (&total)[4], vf decay, const float* B, const float* C,
                                              const float* dx) {
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    const vf B_k = load(B + k * W), C_k = load(C + k * W);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      S[r][k] = next<slow>(decay, S[r][k], splat(dx[r]), B_k);
      total[r] = fma(S[r][k], C_k, total[r]);
    }
  }
}

// Four channels from p, K vectors of states from n, all tokens.
template <int K> void scan(const Block& b, int64_t tokens, int64_t p, int64_t n) {
  const int64_t width = b.states_width;
  const bool last = n + K * W == width;
  vf S[4][K];
  load_tile(S, b.S + p * width + n, width);
  for (int64_t t = 0; t < tokens; ++t) {
    const float *B = b.B + t * width + n, *C = b.C + t * width + n, *dx = b.dx + t * b.width + p;
    float* const kept = b.total + t * 4 * W;
    vf total[4] = {};
    if (n > 0) for (int r = 0; r < 4; ++r) total[r] = load(kept + r * W);
    if (b.slow[t]) take_token<true>(S, total, splat(b.decay[t]), B, C, dx);
    else take_token<false>(S, total, splat(b.decay[t]), B, C, dx);
    if (last) store(b.parts + t * b.width / 4 * W + p / 4 * W, sum4(total[0], total[1], total[2], total[3]));
    else for (int r = 0; r < 4; ++r) store(kept + r * W, total[r]);
  }
  store_tile(b.S + p * width + n, width, S);
}

void load_block(const Ssd& s, Block& b, int64_t row, int64_t begin, int64_t tokens, int64_t head, int64_t group) {
  const auto at = [&](const View& v, int64_t part) {
    return row * v.stride[0] + begin * v.stride[1] + part * v.stride[2];
  };
  load_rows(b.B, s.B, at(s.B, group), s.B.stride[1], tokens, s.states);
  load_rows(b.C, s.C, at(s.C, group), s.C.stride[1], tokens, s.states);
  load_rows(b.x, s.x, at(s.x, head), s.x.stride[1], tokens, s.width);
  const vf A = splat(s.A[head]), bias = splat(s.dt_bias ? s.dt_bias[head] : 0.f);
  for (int64_t t = 0; t < tokens; t += W) {
    alignas(64) float dt[W] = {};
    for (int64_t i = 0; i < W && t + i < tokens; ++i) {
      dt[i] = load(s.dt, row * s.dt.stride[0] + (begin + t + i) * s.dt.stride[1] + head, 1)[0];
    }
    const vf delta = step_size(s, load(dt), bias);
    store(b.delta + t, delta);
    const vf log_a = log_decay(delta, A);
    const vi slow = is_slow(log_a);
    store(b.decay + t, decay_of(log_a));
    std::memcpy(b.slow + t, &slow, sizeof slow);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t p = 0; p < b.width; p += W) store(b.dx + t * b.width + p, b.delta[t] * load(b.x + t * b.width + p));
  }
}

void store_block(const Ssd& s, const Block& b, int64_t row, int64_t begin, int64_t tokens, int64_t head) {
  for (int64_t t = 0; t < tokens; ++t) {
    const auto at = [&](const View& v) { return row * v.stride[0] + (begin + t) * v.stride[1] + head * v.stride[2]; };
    for (int64_t p = 0; p < s.width; p += W) {
      vf parts[W / 4];
      for (int i = 0; i < W / 4; ++i) parts[i] = load(b.parts + t * b.width / 4 * W + (p / 4 + i) * W);
      const vf v = output(s, sum_parts(parts), load(b.x + t * b.width + p), at(s.z) + p, head, p);
      store(s.y, at(s.y) + p, v, s.width - p);
    }
  }
}

void forward_exactly(const Ssd& s, int64_t unit) {
  Block b(s);
  const int64_t q = unit % s.sequences, h = unit / s.sequences, row = s.cu_seqlens ? 0 : q;
  const int64_t begin = s.cu_seqlens ? s.cu_seqlens[q] : 0, end = s.cu_seqlens ? s.cu_seqlens[q + 1] : s.time;
  const int64_t size = s.width * s.states, first = (q * s.heads + h) * size;
  std::fill_n(b.S, b.width * b.states_width, 0.f);
  if (s.state) load_rows(b.S, s.state + first, s.states, s.width, s.states);
  for (int64_t t = begin; t < end; t += kBlock) {
    const int64_t tokens = std::min(kBlock, end - t);
    load_block(s, b, row, t, tokens, h, h / (s.heads / s.groups));
    for (int64_t p = 0; p < s.width; p += 4) {
      int64_t n = 0;
      for (; n + kStates * W <= b.states_width; n += kStates * W) scan<kStates>(b, tokens, p, n);
      for (; n < b.states_width; n += W) scan<1>(b, tokens, p, n);
    }
    store_block(s, b, row, t, tokens, h);
  }
  for (int64_t p = 0; s.state_out && p < s.width; ++p) {
    std::copy_n(b.S + p * b.states_width, s.states, s.state_out + first + p * s.states);
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
