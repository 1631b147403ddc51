#include "selective_scan/update.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kStates = W / 2;   // walked back at a time: their dB and dC fill one vector
constexpr float kLn2 = 0.693147180559945309417f;

// What one tile of channels needs of one chunk of tokens.
struct Chunk {
  alignas(64) float delta[kChunk * W], slope[kChunk * W];   // slope: d delta / d dt
  alignas(64) float du[kChunk * W];                         // delta u
  alignas(64) float dv[kChunk * W], gate[kChunk * W];       // gate: dz = gate v
  alignas(64) float y[kChunk * W], Bg[kChunk * W], Ar[kChunk * W];
  alignas(64) float kept[kChunk * 2 * kStates * W];
};

// States [n, n + kStates) of the chunk: forward from h, keeping exp(delta A) and h, then back with g, which arrives as
// exp(delta A) g of the token after the chunk. shared: [tokens, width / 2, 4], the sums over lanes for dB and dC.
void walk_states(Chunk& c, int64_t tokens, bool first, int64_t width, const float* h0, const float* A, const float* B,
                 const float* C, float* g_n, float* dA_n, float* shared, const Ahead<7>& ahead) {
  vf h[kStates], g[kStates], dA[kStates];
  for (int n = 0; n < kStates; ++n) h[n] = load(h0 + n * W);
  for (int64_t t = 0; t < tokens; ++t) {
    if (first) ahead.fetch(t);
    const vf delta = load(c.delta + t * W), du = load(c.du + t * W), start = first ? vf{} : load(c.y + t * W);
    float* const kept = c.kept + t * 2 * kStates * W;
    store(c.y + t * W, advance<kStates, true>(h, A, B + t * width, C + t * width, delta, du, start, kept));
  }
  for (int n = 0; n < kStates; ++n) {
    g[n] = load(g_n + n * W);
    dA[n] = load(dA_n + n * W);
  }
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float* a = c.kept + t * 2 * kStates * W;
    const float* h_t = a + kStates * W;
    const float* before = t ? h_t - 2 * kStates * W : h0;
    const vf delta = load(c.delta + t * W), du = load(c.du + t * W), dv = load(c.dv + t * W);
    vf Bg = first ? vf{} : load(c.Bg + t * W), Ar = first ? vf{} : load(c.Ar + t * W);
    vf parts[kStates / 2], dB[2], dC[2];
#pragma GCC unroll 8
    for (int n = 0; n < kStates; ++n) {
      g[n] = fma(dv, splat(C[t * width + n]), g[n]);
      Bg = fma(g[n], splat(B[t * width + n]), Bg);
      dB[n % 2] = du * g[n];
      dC[n % 2] = dv * load(h_t + n * W);
      g[n] *= load(a + n * W);
      const vf r = g[n] * load(before + n * W);
      dA[n] = fma(delta, r, dA[n]);
      Ar = fma(load(A + n * W), r, Ar);
      if (n % 2) parts[n / 2] = sum4(dB[0], dB[1], dC[0], dC[1]);
    }
    store(c.Bg + t * W, Bg);
    store(c.Ar + t * W, Ar);
    float* const to = shared + t * width * 2;
    store(to, load(to) + sum_parts(parts));
  }
  for (int n = 0; n < kStates; ++n) {
    store(g_n + n * W, g[n]);
    store(dA_n + n * W, dA[n]);
  }
}

void read_chunk(const SelectiveScan& s, Chunk& c, int64_t row, int64_t begin, int64_t tokens, const Tile& tile) {
  const auto [channel, lanes, group] = tile;
  const vf bias = load_or(s.dt_bias, channel, lanes, 0.f);
  const int64_t u_at = at(s.u, row, begin, channel), dt_at = at(s.dt, row, begin, channel);
  const int64_t z_at = at(s.z, row, begin, channel), dy_at = at(s.dy, row, begin, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    vf delta = load(s.dt, dt_at + t * s.dt.stride[1], lanes) + bias, slope = splat(1.f);
    if (s.dt_softplus) delta = softplus(delta, slope);
    store(c.delta + t * W, delta);
    store(c.slope + t * W, slope);
    store(c.du + t * W, delta * load(s.u, u_at + t * s.u.stride[1], lanes));
    vf dv = s.dy ? load(s.dy, dy_at + t * s.dy.stride[1], lanes) : vf{};
    if (s.z) {
      const vf z = load(s.z, z_at + t * s.z.stride[1], lanes), p = sigmoid(z);
      store(c.gate + t * W, dv * p * fma(z, 1.f - p, splat(1.f)));
      dv *= z * p;
    }
    store(c.dv + t * W, dv);
  }
}

void write_chunk(const SelectiveScan& s, const Chunk& c, int64_t row, int64_t begin, int64_t tokens, const Tile& tile,
                 float* dD, float* dbias) {
  const auto [channel, lanes, group] = tile;
  const vf D = load_or(s.D, channel, lanes, 0.f);
  vf sum_D = load(dD), sum_bias = load(dbias);
  const int64_t u_at = at(s.u, row, begin, channel), du_at = at(s.du, row, begin, channel);
  const int64_t ddt_at = at(s.ddt, row, begin, channel), dz_at = at(s.dz, row, begin, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    const vf u = load(s.u, u_at + t * s.u.stride[1], lanes);
    const vf Bg = load(c.Bg + t * W), dv = load(c.dv + t * W);
    const vf ddt = fma(u, Bg, kLn2 * load(c.Ar + t * W)) * load(c.slope + t * W);   // A carries log2 e
    store(s.du, du_at + t * s.du.stride[1], fma(load(c.delta + t * W), Bg, D * dv), lanes);
    store(s.ddt, ddt_at + t * s.ddt.stride[1], ddt, lanes);
    if (s.z) store(s.dz, dz_at + t * s.dz.stride[1], load(c.gate + t * W) * fma(D, u, load(c.y + t * W)), lanes);
    sum_D = fma(dv, u, sum_D);
    sum_bias += ddt;
  }
  store(dD, sum_D);
  store(dbias, sum_bias);
}

// One block of channels of one group of one row.
void walk_block(const SelectiveScan& s, int64_t row, int64_t group, int64_t block) {
  const int64_t width = padded(s.states), size = width * W;
  const int64_t per_group = tiles_of_group(s.dim, s.groups), first = group * per_group + block * (kBlock / W);
  const int64_t count = first + kBlock / W < (group + 1) * per_group ? kBlock / W : (group + 1) * per_group - first;
  float* const A = s.scratch;
  float* const g = A + kBlock * width;
  float* const dA = g + kBlock * width;
  float* const h0 = dA + kBlock * width;
  float* const shared = h0 + 16 * width;
  float* const B = shared + 2 * kChunk * width;
  float* const C = B + kChunk * width;
  float* const to_shared = s.dBC_blocks + ((row * s.groups + group) * blocks(s) + block) * s.time * 2 * width;
  alignas(64) float dD[kBlock] = {}, dbias[kBlock] = {};
  Chunk c;
  std::memset(dA, 0, count * size * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = tile_at(s.dim, s.groups, first + i);
    load_tile(A + i * size, s.A + tile.channel * s.states, s.states, tile.lanes, kLog2e);
  }
  for (int64_t q = (s.cu_seqlens ? s.sequences : 1) - 1; q >= 0; --q) {
    const int64_t begin = s.cu_seqlens ? s.cu_seqlens[q] : 0, end = s.cu_seqlens ? s.cu_seqlens[q + 1] : s.time;
    const int64_t sequence = s.cu_seqlens ? q : row;
    for (int64_t i = 0; i < count; ++i) {
      const Tile tile = tile_at(s.dim, s.groups, first + i);
      if (s.dstate_out) {
        load_tile(g + i * size, s.dstate_out + (sequence * s.dim + tile.channel) * s.states, s.states, tile.lanes, 1.f);
      } else {
        std::memset(g + i * size, 0, size * sizeof(float));
      }
    }
    for (int64_t t = end, tokens; t > begin; t -= tokens) {
      const int64_t chunk = (t - 1) / kChunk, from = chunk * kChunk > begin ? chunk * kChunk : begin;
      tokens = t - from;
      load_shared(B, s.B, row, from, tokens, group, s.states);
      load_shared(C, s.C, row, from, tokens, group, s.states);
      std::memset(shared, 0, tokens * 2 * width * sizeof(float));
      for (int64_t i = 0; i < count; ++i) {
        const Tile tile = tile_at(s.dim, s.groups, first + i);
        if (from > begin) {
          const float* kept = s.checkpoints + ((row * checkpoints(s.time) + chunk - 1) * s.dim + tile.channel) * s.states;
          for (int64_t n = 0; n < width; ++n) store(h0 + n * W, n < s.states ? load(kept + n * tile.lanes, tile.lanes) : vf{});
        } else if (s.state) {
          load_tile(h0, s.state + (sequence * s.dim + tile.channel) * s.states, s.states, tile.lanes, 1.f);
        } else {
          std::memset(h0, 0, size * sizeof(float));
        }
        read_chunk(s, c, row, from, tokens, tile);
        const bool last = i + 1 == count;
        const Ahead<7> ahead({&s.u, &s.dt, &s.z, &s.dy, &s.du, &s.ddt, &s.dz}, row, last ? from - tokens : from,
                             last ? tile.channel - i * W : tile.channel + W);
        for (int64_t n = 0; n < width; n += kStates) {
          const int64_t at_n = i * size + n * W;
          walk_states(c, tokens, n == 0, width, h0 + n * W, A + at_n, B + n, C + n, g + at_n, dA + at_n, shared + 2 * n, ahead);
        }
        write_chunk(s, c, row, from, tokens, tile, dD + i * W, dbias + i * W);
      }
      std::memcpy(to_shared + from * 2 * width, shared, tokens * 2 * width * sizeof(float));
    }
    for (int64_t i = 0; s.dstate && i < count; ++i) {
      const Tile tile = tile_at(s.dim, s.groups, first + i);
      store_tile(s.dstate + (sequence * s.dim + tile.channel) * s.states, g + i * size, s.states, tile.lanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = tile_at(s.dim, s.groups, first + i);
    store_tile(s.dA_rows + (row * s.dim + tile.channel) * s.states, dA + i * size, s.states, tile.lanes);
    if (s.dD_rows) store(s.dD_rows + row * s.dim + tile.channel, load(dD + i * W), tile.lanes);
    if (s.dbias_rows) store(s.dbias_rows + row * s.dim + tile.channel, load(dbias + i * W), tile.lanes);
  }
}

}  // namespace

void selective_scan_backward(const SelectiveScan& s, int64_t begin, int64_t end) {
  const unsigned denormals = flush_denormals();
  const int64_t per_group = blocks(s), per_row = per_group * s.groups;
  for (int64_t i = begin; i < end; ++i) walk_block(s, i / per_row, i % per_row / per_group, i % per_group);
  restore_denormals(denormals);
}

}  // namespace pyseq::PYSEQ_ISA
