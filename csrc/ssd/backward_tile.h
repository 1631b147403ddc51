// Products of matrices, a tile of the result in registers; and what brings matrices into the shape for it.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace pyseq::PYSEQ_ISA {
namespace {

constexpr int kRows = W == 16 ? 8 : 4;   // by two vectors: enough sums in flight to hide the latency of fma
enum class Left { rows, columns };       // the left matrix is read along its rows, or down its columns

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Floats from row to row of a matrix of n columns: an odd number of vectors, so that columns spread over a cache's sets.
inline int64_t pitch_of(int64_t n) { return ((n + W - 1) / W | 1) * W; }

// each(c) for c < C, 1 or 2, a constant
template <int C, class Each> inline void each_vector(Each each) {
  each(std::integral_constant<int, 0>{});
  if constexpr (C == 2) each(std::integral_constant<int, 1>{});
}

// sum[r][c] += sum over k < depth of left(r, k) right[k][c], c in vectors
template <Left L, int C>
inline void multiply(vf (&sum)[kRows][C], const float* left, int64_t left_pitch, const float* right, int64_t right_pitch,
                     int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, right += right_pitch) {
    vf v[C];
    each_vector<C>([&](auto c) { v[c] = load(right + c * W); });
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf a = splat(L == Left::rows ? left[r * left_pitch + k] : left[k * left_pitch + r]);
      each_vector<C>([&](auto c) { sum[r][c] = fma(a, v[c], sum[r][c]); });
    }
  }
}

// run(C, row, column) for each tile of kRows by C vectors; `columns` is a multiple of W. Columns are the outer loop: the
// panel of the right matrix that a column of tiles shares stays in the first cache.
template <class Run> inline void each_tile(int64_t rows, int64_t columns, Run run) {
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    for (int64_t r = 0; r < rows; r += kRows) run(std::integral_constant<int, 2>{}, r, c);
  }
  for (int64_t r = 0; c < columns && r < rows; r += kRows) run(std::integral_constant<int, 1>{}, r, c);
}

// to[i][j] = <left[i], right[:, j]> where j <= i; of the rest only what shares a vector or a tile with those is written.
inline void lower_product(int64_t rows, int64_t depth, const float* left, int64_t left_pitch, const float* right,
                          int64_t right_pitch, float* to, int64_t pitch) {
  for (int64_t i = 0; i < rows; i += kRows) {
    each_tile(kRows, round_up(i + kRows, W), [&](auto C, int64_t, int64_t j) {
      vf sum[kRows][C] = {};
      multiply<Left::rows>(sum, left + i * left_pitch, left_pitch, right + j, right_pitch, depth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        each_vector<C>([&](auto c) { store(to + (i + r) * pitch + j + c * W, sum[r][c]); });
      }
    });
  }
}

// to[n][j] += sum over k in [begin(j), end(j)) of left[k][n] right[k][j], for the vectors j
template <class Range>
inline void add_product(int64_t rows, int64_t columns, const float* left, int64_t left_pitch, const float* right, float* to,
                        int64_t pitch, Range range) {
  each_tile(rows, columns, [&](auto C, int64_t n, int64_t j) {
    const auto [begin, end] = range(j, j + C * W);
    vf sum[kRows][C] = {};
    multiply<Left::columns>(sum, left + begin * left_pitch + n, left_pitch, right + begin * pitch + j, pitch, end - begin);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      each_vector<C>([&](auto c) {
        float* const p = to + (n + r) * pitch + j + c * W;
        store(p, load(p) + sum[r][c]);
      });
    }
  });
}

// to[t][:] = from, rows of a tensor `stride` elements apart; zeros from `rows` to `padded`, and behind `width` in the last vector
inline void load_rows(const View& from, int64_t first, int64_t stride, int64_t rows, int64_t padded, int64_t width, float* to,
                      int64_t pitch) {
  for (int64_t t = 0; t < padded; ++t) {
    for (int64_t i = 0; i < width; i += W) {
      store(to + t * pitch + i, t < rows ? load(from, first + t * stride + i, width - i) : vf{});
    }
  }
}

// to[c][r] = from[r][c]: `to_rows` rows of `to_columns`, zeros where from, rows by columns, has nothing.
inline void transposed(const float* from, int64_t pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch,
                       int64_t to_rows, int64_t to_columns) {
  for (int64_t c = 0; c < to_rows; c += W) {
    for (int64_t r = 0; r < to_columns; r += W) {
      vf row[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        row[i] = r + i < rows && c < columns ? load(from + (r + i) * pitch + c, columns - c) : vf{};
      }
      transpose(row);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (c + i < to_rows) store(to + (c + i) * to_pitch + r, row[i], to_columns - r);
      }
    }
  }
}

}  // namespace
}  // namespace pyseq::PYSEQ_ISA
