#include <type_traits>

#include "selective_scan/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int64_t kTokens = 32;   // staged at a time: the rows of a tile, B and C of the tokens fit in the first-level cache

// y[t] += <C[t], h[t]> over states [n, n + NB), whose h stays in registers. The first states start y.
template <int NB>
void scan_states(float* h_n, const float* A, const float* B, const float* C, int64_t width, const float* delta,
                 const float* du, float* y, bool first, int64_t tokens, const Ahead<4>& ahead) {
  vf h[NB];
  for (int n = 0; n < NB; ++n) h[n] = load(h_n + n * W);
  for (int64_t t = 0; t < tokens; ++t) {
    if (first) ahead.fetch(t);
    const vf start = first ? vf{} : load(y + t * W);
    store(y + t * W, advance(h, A, B + t * width, C + t * width, load(delta + t * W), load(du + t * W), start));
  }
  for (int n = 0; n < NB; ++n) store(h_n + n * W, h[n]);
}

void scan_tokens(const SelectiveScan& s, int64_t row, int64_t begin, int64_t tokens, const Tile& tile,
                 const Ahead<4>& ahead, const float* A, const float* B, const float* C, float* h) {
  alignas(64) float delta[kTokens * W], du[kTokens * W], y[kTokens * W];
  const auto [channel, lanes, group] = tile;
  const vf bias = load_or(s.dt_bias, channel, lanes, 0.f), D = load_or(s.D, channel, lanes, 0.f);
  const int64_t u_at = at(s.u, row, begin, channel), dt_at = at(s.dt, row, begin, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    const vf raw = load(s.dt, dt_at + t * s.dt.stride[1], lanes) + bias, d = s.dt_softplus ? softplus(raw) : raw;
    store(delta + t * W, d);
    store(du + t * W, d * load(s.u, u_at + t * s.u.stride[1], lanes));
  }
  int64_t n = 0;
  const auto scan = [&]<int NB>(std::integral_constant<int, NB>) {
    for (; n + NB <= s.states; n += NB) {
      scan_states<NB>(h + n * W, A + n * W, B + n, C + n, padded(s.states), delta, du, y, n == 0, tokens, ahead);
    }
  };
  if constexpr (W == 16) scan(std::integral_constant<int, 16>{});
  scan(std::integral_constant<int, 8>{});
  scan(std::integral_constant<int, 1>{});
  const int64_t y_at = at(s.y, row, begin, channel), z_at = at(s.z, row, begin, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    vf v = load(y + t * W);
    if (s.D) v = fma(D, load(s.u, u_at + t * s.u.stride[1], lanes), v);
    store(s.y, y_at + t * s.y.stride[1], s.z ? v * silu(load(s.z, z_at + t * s.z.stride[1], lanes)) : v, lanes);
  }
}

// Tiles [first, first + count) of one group of a row.
void scan_row(const SelectiveScan& s, int64_t row, int64_t first, int64_t count) {
  const int64_t width = padded(s.states), size = width * W;
  float* const A = s.scratch;
  float* const h = A + kBlock * width;
  float* const B = h + kBlock * width;
  float* const C = B + kChunk * width;
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = tile_at(s.dim, s.groups, first + i);
    load_tile(A + i * size, s.A + tile.channel * s.states, s.states, tile.lanes, kLog2e);
  }
  for (int64_t q = 0; q < (s.cu_seqlens ? s.sequences : 1); ++q) {
    const int64_t begin = s.cu_seqlens ? s.cu_seqlens[q] : 0, end = s.cu_seqlens ? s.cu_seqlens[q + 1] : s.time;
    const int64_t sequence = s.cu_seqlens ? q : row;
    for (int64_t i = 0; i < count; ++i) {
      const Tile tile = tile_at(s.dim, s.groups, first + i);
      if (s.state) {
        load_tile(h + i * size, s.state + (sequence * s.dim + tile.channel) * s.states, s.states, tile.lanes, 1.f);
      } else {
        std::memset(h + i * size, 0, size * sizeof(float));
      }
    }
    for (int64_t t = begin, tokens; t < end; t += tokens) {
      tokens = (t / kTokens + 1) * kTokens < end ? (t / kTokens + 1) * kTokens - t : end - t;
      const int64_t group = tile_at(s.dim, s.groups, first).group;
      load_shared(B, s.B, row, t, tokens, group, s.states);
      load_shared(C, s.C, row, t, tokens, group, s.states);
      for (int64_t i = 0; i < count; ++i) {
        const Tile tile = tile_at(s.dim, s.groups, first + i);
        if (s.checkpoints && t % kChunk == 0 && t > 0) {
          float* to = s.checkpoints + ((row * checkpoints(s.time) + t / kChunk - 1) * s.dim + tile.channel) * s.states;
          for (int64_t n = 0; n < s.states; ++n) store(to + n * tile.lanes, load(h + i * size + n * W), tile.lanes);
        }
        const bool last = i + 1 == count;
        const Ahead<4> ahead({&s.u, &s.dt, &s.z, &s.y}, row, last ? t + tokens : t,
                             last ? tile.channel - i * W : tile.channel + W);
        scan_tokens(s, row, t, tokens, tile, ahead, A + i * size, B, C, h + i * size);
      }
    }
    for (int64_t i = 0; s.state_out && i < count; ++i) {
      const Tile tile = tile_at(s.dim, s.groups, first + i);
      store_tile(s.state_out + (sequence * s.dim + tile.channel) * s.states, h + i * size, s.states, tile.lanes);
    }
  }
}

}  // namespace

int64_t selective_scan_tiles(int64_t dim, int64_t groups) { return tiles_of_group(dim, groups) * groups; }

void selective_scan_forward(const SelectiveScan& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  const int64_t per_group = tiles_of_group(s.dim, s.groups), per_row = per_group * s.groups;
  for (int64_t i = begin, count; i < end; i += count) {
    count = kBlock / W;
    if (count > per_group - i % per_group) count = per_group - i % per_group;
    if (count > end - i) count = end - i;
    scan_row(s, i / per_row, i % per_row, count);
  }
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
