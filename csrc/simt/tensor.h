// mma.sync and ldmatrix: the warp meets, and the last lane to arrive computes for all.
//
// Modelled: which lane holds which element, the rounding of inputs to tf32, that all 32 lanes take part, the alignment
// and the place of the rows that ldmatrix reads. Not modelled: the order in which a tensor core adds, which is not
// documented; here a sum is exact until one rounding at its end, and set_noise() puts an error into it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "simt/block.h"
#include "simt/intrinsics.h"
#include "simt/shared_memory.h"
#include "simt/warp.h"

namespace simt {

template <class T> using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int, float>;

inline double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double widen(__half x) { return __half2float(x); }
inline double widen(int8_t x) { return x; }
inline double widen(float x) {                                   // to tf32, 10 bits of fraction, halves away from zero
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? std::bit_cast<float>((bits + 0x1000u) & ~0x1fffu) : x;
}

template <class T> struct Fragments { Accumulator<T>* d; const unsigned *a, *b; };

// Lane 4 g + t holds, with e elements to a register: a[r] = A[g + 8 (r % 2)][4 e (r / 2) + e t ...],
// b[r] = B[4 e r + e t ...][g], d[r] = D[g + 8 (r / 2)][2 t + r % 2].
template <class T> [[gnu::no_sanitize("thread")]] void multiply(uint32_t present, void* const* operand) {
  constexpr int e = 4 / sizeof(T), K = 8 * e;
  if (present != ~0u) incomplete(present);
  double a[16][K], b[8][K];
  for (int lane = 0; lane < int(kWarp); ++lane) {
    const auto& own = *static_cast<const Fragments<T>*>(operand[lane]);
    const int g = lane / 4, t = lane % 4;
    T element[e];
    for (int r = 0; r < 4; ++r) {
      std::memcpy(static_cast<void*>(element), own.a + r, 4);
      for (int j = 0; j < e; ++j) a[g + r % 2 * 8][r / 2 * 4 * e + e * t + j] = widen(element[j]);
    }
    for (int r = 0; r < 2; ++r) {
      std::memcpy(static_cast<void*>(element), own.b + r, 4);
      for (int j = 0; j < e; ++j) b[g][r * 4 * e + e * t + j] = widen(element[j]);
    }
  }
  for (int lane = 0; lane < int(kWarp); ++lane) {
    auto* const d = static_cast<const Fragments<T>*>(operand[lane])->d;
    for (int r = 0; r < 4; ++r) {
      const double *row = a[lane / 4 + r / 2 * 8], *column = b[lane % 4 * 2 + r % 2];
      double sum = 0.0, size = 0.0;
      for (int k = 0; k < K; ++k) sum += row[k] * column[k], size += std::abs(row[k] * column[k]);
      if constexpr (std::is_same_v<T, int8_t>) d[r] = int(unsigned(d[r]) + unsigned(int(sum)));   // wraps
      else d[r] = float(d[r] + sum + noise(std::bit_cast<uint32_t>(d[r])) * 0x1p-23 * (size + std::abs(d[r])));
    }
  }
}

template <class T>
void mma(Accumulator<T> (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Where where = Where::current()) {
  Fragments<T> mine{d, a, b};
  meet({__func__, ~0u, where}, multiply<T>, &mine);
}

struct Rows { const void* row; unsigned* result; };

// Lane 8 i + j gives row j of matrix i, 8 elements of 16 bits; lane 4 g + t gets elements 2 t, 2 t + 1 of row g of each
// matrix, transposed: of column g.
template <int n, bool transposed>
[[gnu::no_sanitize("thread")]] void distribute(uint32_t present, void* const* operand) {
  if (present != ~0u) incomplete(present);
  for (int i = 0; i < n; ++i) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; ++j) std::memcpy(matrix[j], static_cast<const Rows*>(operand[8 * i + j])->row, 16);
    for (int lane = 0; lane < int(kWarp); ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const unsigned low = transposed ? matrix[t][g] : matrix[g][t];
      const unsigned high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<Rows*>(operand[lane])->result[i] = low | high << 16;
    }
  }
}

template <int n, bool transposed = false>
[[gnu::noinline, gnu::no_sanitize("thread")]] void ldmatrix(unsigned (&result)[n], const void* row,
                                                            Where where = Where::current()) {
  static_assert(n == 1 || n == 2 || n == 4);
  const Site site{__func__, ~0u, where};
  if (lane() < 8 * n) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fault(site, "a row that is not aligned to 16 bytes");
    if (!in_shared(row, 16)) fault(site, "a row outside shared memory");
    if (observe) observe(row, 16, Touch::read, __builtin_return_address(0));
  }
  Rows mine{row, result};
  meet(site, distribute<n, transposed>, &mine);
}

}  // namespace simt
