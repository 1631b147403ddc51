// Several neighbouring elements at once, in accesses of up to 16 bytes, as floats.
#pragma once
#include "cuda/device.cuh"

namespace pyseq {

template <int n> struct Vec {
  float v[n];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

// The unit of one access: 16 bytes, or all n elements where they are fewer.
template <int bytes> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

constexpr int access_bytes(int64_t bytes) { return int(bytes < 16 ? bytes : 16); }

// p is aligned to access_bytes(n * sizeof(T)); n is a power of two.
template <int n, class T> __device__ __forceinline__ Vec<n> load_vec(const T* p) {
  constexpr int kBytes = access_bytes(n * sizeof(T)), kEach = kBytes / int(sizeof(T));
  using W = typename Word<kBytes>::type;
  Vec<n> x;
#pragma unroll
  for (int i = 0; i < n; i += kEach) {
    const W word = *reinterpret_cast<const W*>(p + i);
    const T* const part = reinterpret_cast<const T*>(&word);
#pragma unroll
    for (int j = 0; j < kEach; ++j) x[i + j] = load(part + j);
  }
  return x;
}

template <int n, class T> __device__ __forceinline__ void store_vec(T* p, const Vec<n>& x) {
  constexpr int kBytes = access_bytes(n * sizeof(T)), kEach = kBytes / int(sizeof(T));
  using W = typename Word<kBytes>::type;
#pragma unroll
  for (int i = 0; i < n; i += kEach) {
    W word;
    T* const part = reinterpret_cast<T*>(&word);
#pragma unroll
    for (int j = 0; j < kEach; ++j) store(part + j, x[i + j]);
    *reinterpret_cast<W*>(p + i) = word;
  }
}

// The same with the dtype known only at run time. `count` elements exist; the others read as zero and are not written.
// One access per element where `vectorised` is false or some are missing.
template <int n>
__device__ __forceinline__ Vec<n> load_vec(const View& x, int64_t offset, bool vectorised, int64_t count = n) {
  if (vectorised && count >= n) {
    switch (x.type) {
      case DType::bf16: return load_vec<n>(static_cast<const __nv_bfloat16*>(x.data) + offset);
      case DType::f16: return load_vec<n>(static_cast<const __half*>(x.data) + offset);
      default: return load_vec<n>(static_cast<const float*>(x.data) + offset);
    }
  }
  Vec<n> y;
#pragma unroll
  for (int i = 0; i < n; ++i) y[i] = i < count ? load(x, offset + i) : 0.f;
  return y;
}

template <int n>
__device__ __forceinline__ void store_vec(const View& y, int64_t offset, const Vec<n>& x, bool vectorised,
                                          int64_t count = n) {
  if (vectorised && count >= n) {
    switch (y.type) {
      case DType::bf16: return store_vec<n>(static_cast<__nv_bfloat16*>(y.data) + offset, x);
      case DType::f16: return store_vec<n>(static_cast<__half*>(y.data) + offset, x);
      default: return store_vec<n>(static_cast<float*>(y.data) + offset, x);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < count) store(y, offset + i, x[i]);
}

// Whether n elements at any multiple of n along the last axis may be one access. An absent tensor is no obstacle.
inline bool vectorisable(const View& x, int n, int axes) {
  const int64_t bytes = access_bytes(n * size_of(x.type));
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
  for (int i = 0; i < axes; ++i) aligned = aligned && x.stride[i] * size_of(x.type) % bytes == 0;
  return aligned;
}

}  // namespace pyseq
