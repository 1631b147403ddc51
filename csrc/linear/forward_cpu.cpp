#include <utility>

#include "cpu/dot.h"
#include "linear/pack.h"

namespace pyseq::PYSEQ_ISA {

namespace {

// A register tile is R rows by C vectors of outputs, all of whose sums stay in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 14;      // rows of a full tile: 14 x 2 sums, 2 vectors of w and one of x fill 32 registers
constexpr int kBlock = 15;     // tiles in a unit of work: 210 rows
#else
constexpr int kTile = 6;       // 6 x 2, of 16
constexpr int kBlock = 35;
#endif
constexpr int kNarrow = 2;     // C of a full tile
constexpr int wide(int64_t rows) {   // C of a low tile: enough sums in flight to hide the latency of fma
  return rows <= kTile / 5 ? 8 : rows <= (kTile == 14 ? 6 : 3) ? 4 : kNarrow;
}
constexpr int kVectors = kPanel / W;   // in a panel
constexpr int64_t kGroup = 4;          // panels that one pass over the rows takes
constexpr int64_t kAhead = 8192;       // words that the prefetch runs ahead: keeps DRAM busy while rows are multiplied

enum class Product { f32, pairs, dot };   // of x and w: float32 each; float32 and pairs; pairs each

// sum[r][c] += x[r] w[c]: w read once, x[r] broadcast once, in the order that keeps every sum in a register
template <Product P, int R, int C> inline void multiply(vf (&sum)[R][C], const float* x, const vf (&w)[C]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf v = splat(x[r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#if defined(__AVX512F__)
      sum[r][c] = P == Product::dot ? dot_bf16(as_int(v), as_int(w[c]), sum[r][c]) : fma(v, w[c], sum[r][c]);
#else
      sum[r][c] = fma(v, w[c], sum[r][c]);
#endif
    }
  }
}

// total[r][c] (+)= the sum over n words of x[.][r] w[.][c]; `panel` words lie between two panels
template <Product P, int R, int C>
void tile(const float* x, const float* w, int64_t panel, int64_t n, float* total, int64_t width, bool first) {
  vf sum[R][C] = {};
  for (int64_t k = 0; k < n; ++k, w += kPanel) {
    vf v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const float* word = w + c / kVectors * panel + c % kVectors * W;
      if (c * W % 16 == 0) __builtin_prefetch(word + kAhead, 0, 2);
      v[c] = load(word);
    }
    if constexpr (P == Product::pairs) {
      vf half[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) half[c] = as_float(as_int(v[c]) & int32_t(0xffff0000));
      multiply<P>(sum, x + R, half);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) half[c] = as_float(as_int(v[c]) << 16);
      multiply<P>(sum, x, half);
      x += 2 * R;
    } else {
      multiply<P>(sum, x, v);
      x += R;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = total + r * width + c * W;
      store(to, first ? sum[r][c] : load(to) + sum[r][c]);
    }
  }
}

using Tile = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t, bool);
struct Tiles { Tile wide[kTile + 1], narrow[kTile + 1]; };   // by rows

template <Product P, int... R> constexpr Tiles make_tiles(std::integer_sequence<int, R...>) {
  return {{nullptr, tile<P, R + 1, wide(R + 1)>...}, {nullptr, tile<P, R + 1, kNarrow>...}};
}
template <Product P> constexpr Tiles kTiles = make_tiles<P>(std::make_integer_sequence<int, kTile>());

const Tiles& tiles_for(const Linear& l) {
#if defined(__AVX512F__)
  if (l.dot) return kTiles<Product::dot>;
#endif
  return l.pairs ? kTiles<Product::pairs> : kTiles<Product::f32>;
}

int64_t words(const Linear& l, int64_t k) { return l.pairs ? (k + 1) / 2 : k; }
int64_t floats_per_word(const Linear& l) { return l.pairs && !l.dot ? 2 : 1; }   // in packed x

// Tiles differ by one row at most.
int64_t tile_row(const Linear& l, int64_t tile) { return l.M * tile / linear_tiles(l.M); }

void load_totals(const Linear& l, int64_t row, int64_t rows, int64_t column, int64_t width, float* total) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = std::min(width, l.N - column);
    std::memcpy(total + r * width, l.total + (row + r) * l.N + column, n * sizeof(float));
  }
}

void store_totals(const Linear& l, int64_t row, int64_t rows, int64_t column, int64_t width, const float* total) {
  const bool last = l.end == l.K;
  const View to = last ? l.y : View{l.total, DType::f32, {l.N}};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width && column + i < l.N; i += W) {
      const int64_t n = l.N - column - i;
      vf v = load(total + r * width + i);
      if (last && l.bias) v += load(l.bias + column + i, n);
      store(to, (row + r) * to.stride[0] + column + i, v, n);
    }
  }
}

}  // namespace

int64_t linear_tiles(int64_t M) { return (M + kTile - 1) / kTile; }
int64_t linear_blocks(int64_t M) { return (linear_tiles(M) + kBlock - 1) / kBlock; }

void linear_pack_rows(const Linear& l, int64_t begin, int64_t end) {
  const int64_t floats = words(l, l.end - l.begin) * floats_per_word(l);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = tile_row(l, t), rows = tile_row(l, t + 1) - row;
    float* out = l.rows + row * floats;
    pack_strip(l.x, l.dot, row, rows, rows, l.begin, l.end, out);
    const int64_t packed = l.dot ? floats : l.end - l.begin;
    std::fill(out + packed * rows, out + floats * rows, 0.f);   // the partner of an odd last k
  }
}

void linear_forward(const Linear& l, int64_t begin, int64_t end) {
  const Tiles& kernels = tiles_for(l);
  const int64_t tiles = linear_tiles(l.M), blocks = linear_blocks(l.M), panels = (l.N + kPanel - 1) / kPanel;
  const int64_t depth = words(l, l.end - l.begin), per_word = l.pairs ? 2 : 1, floats = floats_per_word(l);
  const int64_t panel_words = l.panels ? words(l, l.K) * kPanel : 0;
  const int64_t side_by_side = tiles == 1 && l.panels ? wide(l.M) / kVectors : 0;   // panels that a low tile spans
  const int64_t most = tiles > 1 ? kGroup : std::max<int64_t>(side_by_side, 1);
  alignas(64) float total[kBlock * kTile * kGroup * kPanel], packed[kChunk * kPanel];
  for (int64_t unit = begin, group; unit < end; unit += group) {
    const int64_t block = unit / panels, panel = unit % panels;
    const int64_t tile_begin = tiles * block / blocks, tile_end = tiles * (block + 1) / blocks;
    const int64_t row = tile_row(l, tile_begin), rows = tile_row(l, tile_end) - row;
    group = std::min({most, panels - panel, end - unit});
    const int64_t column = panel * kPanel, width = group * kPanel;
    if (l.begin > 0) load_totals(l, row, rows, column, width, total);
    else if (depth == 0) std::fill(total, total + rows * width, 0.f);
    for (int64_t k = 0; k < depth; k += kChunk) {
      const int64_t n = std::min(kChunk, depth - k);
      for (int64_t p = 0, step; p < group; p += step) {
        const bool widely = side_by_side > 0 && p + side_by_side <= group;
        step = widely ? side_by_side : 1;
        const float* w = packed;
        if (l.panels) {
          w = l.panels + (panel + p) * panel_words + (words(l, l.begin) + k) * kPanel;
        } else {
          const int64_t first = column + p * kPanel, from = l.begin + k * per_word;
          const int64_t to = std::min(from + n * per_word, l.end);
          pack_strip(l.w, l.pairs, first, std::min(kPanel, l.N - first), kPanel, from, to, packed);
        }
        const int64_t columns = widely ? step * kPanel : kNarrow * W;
        for (int64_t t = tile_begin; t < tile_end; ++t) {
          const int64_t at = tile_row(l, t), R = tile_row(l, t + 1) - at;
          const float* x = l.rows + (at * depth + k * R) * floats;
          const Tile run = widely ? kernels.wide[R] : kernels.narrow[R];
          float* to = total + (at - row) * width + p * kPanel;
          for (int64_t c = 0; c < step * kPanel; c += columns) {
            run(x, w + c, panel_words, n, to + c, width, l.begin == 0 && k == 0);
          }
        }
      }
    }
    store_totals(l, row, rows, column, width, total);
  }
}

}  // namespace pyseq::PYSEQ_ISA
