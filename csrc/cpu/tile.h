// Products of small float32 matrices in the scratch of a thread, by register tiles: R rows by C vectors of sums.
#pragma once
#include "cpu/dot.h"

namespace pyseq::PYSEQ_ISA {
namespace {

// The largest tile: its sums, C vectors of w and one number of a fill the registers.
constexpr int kTileRows = 6, kTileVectors = W == 16 ? 4 : 2;

inline int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

// What a number of a matrix is: a float32, or (AVX-512, where the caller knows of products of pairs) a word of two
// bfloat16 that lie along k.
struct Singles {
  static vf add(vf a, vf w, vf sum) { return fma(a, w, sum); }
  static int64_t words(int64_t k) { return k; }
};
#if defined(__AVX512F__)
struct Pairs {
  static vf add(vf a, vf w, vf sum) { return dot_bf16(as_int(a), as_int(w), sum); }
  static int64_t words(int64_t k) { return (k + 1) / 2; }
};
#endif

// One k: sum[r][c] += a[r * row] w[c W ...] for rows [from, to).
template <class P = Singles, int R, int C>
[[gnu::always_inline]] inline void multiply_one(vf (&sum)[R][C], int from, int to, const float* a, int64_t row,
                                                const float* w) {
  vf v[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) v[c] = load(w + c * W);
#pragma GCC unroll 8
  for (int r = from; r < to; ++r) {
    const vf x = splat(a[r * row]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = P::add(x, v[c], sum[r][c]);
  }
}

// sum[r][c] += the sum over k < n of a[r * row + k * step] w[k * width + c W ...]
template <class P = Singles, int R, int C>
[[gnu::always_inline]] inline void multiply(vf (&sum)[R][C], const float* a, int64_t row, int64_t step, const float* w,
                                            int64_t width, int64_t n) {
  for (int64_t k = 0; k < n; ++k) multiply_one<P>(sum, 0, R, a + k * step, row, w + k * width);
}

// The R x R block on a diagonal: row r takes k <= r (multiply_lower) or k >= r (multiply_upper). What lies on the other
// side is not used: a NaN there, of a token that has yet to come, stays there.
template <int R, int C>
[[gnu::always_inline]] inline void multiply_lower(vf (&sum)[R][C], const float* a, int64_t row, int64_t step,
                                                  const float* w, int64_t width) {
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) multiply_one(sum, k, R, a + k * step, row, w + k * width);
}
template <int R, int C>
[[gnu::always_inline]] inline void multiply_upper(vf (&sum)[R][C], const float* a, int64_t row, int64_t step,
                                                  const float* w, int64_t width) {
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) multiply_one(sum, 0, k + 1, a + k * step, row, w + k * width);
}

// What the sums of a tile start from, and where they go. Rows are `width` apart.
template <int R, int C>
[[gnu::always_inline]] inline void load_tile(vf (&sum)[R][C], const float* from, int64_t width) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = load(from + r * width + c * W);
  }
}
template <int R, int C>
[[gnu::always_inline]] inline void store_tile(float* to, int64_t width, const vf (&sum)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(to + r * width + c * W, sum[r][c]);
  }
}
template <int R, int C>
[[gnu::always_inline]] inline void scale_rows(vf (&sum)[R][C], const float* by) {   // sum[r] *= by[r]
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf v = splat(by[r]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] *= v;
  }
}

// Calls f.operator()<R, C>(row, column) for tiles that cover rows x columns; the last of a row of tiles may reach to
// whole_vectors(columns). R is 6 until fewer rows are left, then 4, 2 and 1.
template <int R, class F> inline void for_columns(int64_t row, int64_t columns, const F& f) {
  int64_t c = 0;
  if constexpr (kTileVectors == 4) {
    for (; c + 3 * W < columns; c += 4 * W) f.template operator()<R, 4>(row, c);
  }
  for (; c + W < columns; c += 2 * W) f.template operator()<R, 2>(row, c);
  if (c < columns) f.template operator()<R, 1>(row, c);
}
template <class F> inline void for_tiles(int64_t rows, int64_t columns, const F& f) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) for_columns<6>(r, columns, f);
  if (r + 4 <= rows) for_columns<4>(r, columns, f), r += 4;
  if (r + 2 <= rows) for_columns<2>(r, columns, f), r += 2;
  if (r < rows) for_columns<1>(r, columns, f);
}

// Rows of a tensor to float32 rows of whole_vectors(columns), zeros behind. x starts at element `at`; its rows are
// `stride` apart.
template <class T> inline void load_rows(float* to, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  const int64_t width = whole_vectors(columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += W) store(to + r * width + c, load(from + r * stride + c, columns - c));
  }
}
inline void load_rows(float* to, const View& x, int64_t at, int64_t stride, int64_t rows, int64_t columns) {
  switch (x.type) {
    case DType::bf16: return load_rows(to, static_cast<const bf16*>(x.data) + at, stride, rows, columns);
    case DType::f16: return load_rows(to, static_cast<const f16*>(x.data) + at, stride, rows, columns);
    default: return load_rows(to, static_cast<const float*>(x.data) + at, stride, rows, columns);
  }
}

// to[column][row] = from[row][column]. Rows of `to` are to_width wide: zeros behind `rows`.
inline void transpose_rows(float* to, int64_t to_width, const float* from, int64_t from_width, int64_t rows,
                           int64_t columns) {
  for (int64_t r = 0; r < to_width; r += W) {
    for (int64_t c = 0; c < columns; c += W) {
      vf v[W];
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) v[i] = r + i < rows ? load(from + (r + i) * from_width + c, columns - c) : vf{};
      transpose(v);
      for (int64_t i = 0; i < W && c + i < columns; ++i) store(to + (c + i) * to_width + r, v[i], to_width - r);
    }
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
