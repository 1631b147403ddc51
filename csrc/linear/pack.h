// Transposes a strip of rows into the k-first order in which a register tile reads it.
#pragma once
#include <algorithm>

#include "cpu/simd.h"
#include "linear/kernel.h"

namespace pyseq::PYSEQ_ISA {

constexpr int64_t kStripAhead = 256;   // bytes by which a prefetch runs ahead: a core alone follows fewer than 32 rows

// W words from p, of which n elements exist: zeros behind. A word is a float32 or, with kPairs, two bfloat16.
template <bool kPairs, class T> inline vf words(const T* p, int64_t n) {
  if constexpr (!kPairs) return n > 0 ? load(p, n) : vf{};
  vf v{};
  if (n >= 2 * W) std::memcpy(&v, p, sizeof v);
  else if (n > 0) std::memcpy(&v, p, n * sizeof(T));
  return v;
}

// The rows lie side by side: copy, or zip two k.
template <bool kPairs, class T>
void copy_strip(const T* data, int64_t stride, int64_t count, int64_t width, int64_t K, float* strip) {
  for (int64_t k = 0; k < K; k += 1 + kPairs, strip += width) {
    for (int64_t i = 0; i < width; i += W) {
      const T* p = data + k * stride + i;
      __builtin_prefetch(p + 8 * stride);
      vf v = words<false>(p, count - i);
      if constexpr (kPairs) {
        const vf odd = k + 1 < K ? words<false>(p + stride, count - i) : vf{};
        v = as_float((as_int(v) >> 16 & 0xffff) | as_int(odd));
      }
      store(strip + i, v, std::min<int64_t>(W, width - i));
    }
  }
}

template <bool kPairs, class T>
void transpose_strip(const T* data, int64_t stride, int64_t count, int64_t width, int64_t K, float* strip) {
  constexpr int64_t per_word = 1 + kPairs;
  const int64_t depth = (K + kPairs) / per_word;
  const float* const end = strip + depth * width;
  for (int64_t i = 0; i < width; i += W) {
    for (int64_t k = 0; k < depth; k += W) {
      const T* p = data + i * stride + k * per_word;
      float* out = strip + k * width + i;
      if (i + W <= count && (k + W) * per_word <= K) {
        vf r[W];
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j, p += stride) {
          r[j] = words<kPairs>(p, W * per_word);
          __builtin_prefetch(p + kStripAhead / sizeof(T));
        }
        transpose(r);
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j, out += width) store(out, r[j]);
        continue;
      }
      vf r[W];
      for (int64_t j = 0; j < W; ++j, p += stride) {
        r[j] = i + j < count ? words<kPairs>(p, K - k * per_word) : vf{};
      }
      transpose(r);
      // In a narrow strip the lanes that reach into the next word's place are overwritten by it.
      for (int64_t j = 0; j < W && k + j < depth; ++j, out += width) {
        store(out, r[j], i == 0 && out + W <= end ? W : std::min<int64_t>(W, width - i));
      }
    }
  }
}

template <bool kPairs, class T>
void pack_strip(const Matrix& a, int64_t first, int64_t count, int64_t width, int64_t begin, int64_t end,
                float* strip) {
  const T* data = static_cast<const T*>(a.data) + first * a.row + begin * a.depth;
  if (a.depth == 1) transpose_strip<kPairs>(data, a.row, count, width, end - begin, strip);
  else copy_strip<kPairs>(data, a.depth, count, width, end - begin, strip);
}

// strip[word][0, width) <- k in [begin, end) of rows [first, first + count), zeros from count to width.
// With `pairs` a is bfloat16 and begin is even.
inline void pack_strip(const Matrix& a, bool pairs, int64_t first, int64_t count, int64_t width, int64_t begin,
                       int64_t end, float* strip) {
  if (pairs) return pack_strip<true, bf16>(a, first, count, width, begin, end, strip);
  switch (a.type) {
    case DType::bf16: return pack_strip<false, bf16>(a, first, count, width, begin, end, strip);
    case DType::f16: return pack_strip<false, f16>(a, first, count, width, begin, end, strip);
    default: return pack_strip<false, float>(a, first, count, width, begin, end, strip);
  }
}

}  // namespace pyseq::PYSEQ_ISA
