// What the forward and the backward share on a GPU: which threads have which group, vectors of any dtype that are
// loaded before they are converted, and the sum over a group.
#pragma once
#include <type_traits>

#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "rms_norm_gated/kernel.h"

namespace pyseq {
namespace {

constexpr int n = 8;                   // neighbouring channels of a thread: 16 bytes of 16-bit data
constexpr int kVectors = 2;            // such vectors that a thread keeps in registers
constexpr int kNormSmallBlock = 128;   // threads of a block that has several groups
static_assert(kRmsNormMostGroups + kNormSmallBlock <= int64_t(1) << 32);
constexpr int kNormMost = 512;         // threads of one group at most, which leaves 128 registers for each

// A group has a power of two of neighbouring threads up to a warp, else whole warps and a block to itself. The kVectors
// of a thread lie `threads * n` channels apart; of longer groups it reads the rest from memory twice. Which thread has
// what depends on the group's size only, so that sums have the same bits whatever the strides.
inline int norm_threads(int64_t group) {
  const int64_t wanted = (group + n * kVectors - 1) / (n * kVectors);
  if (wanted > 16) return int(min((wanted + 31) / 32 * 32, int64_t(kNormMost)));
  int threads = 1;
  while (threads < wanted) threads *= 2;
  return threads;
}
inline int norm_block(int threads) { return threads > 32 ? threads : kNormSmallBlock; }
inline dim3 norm_grid(int64_t units, int threads) {   // never empty
  const int64_t each = norm_block(threads) / threads, blocks = (units + each - 1) / each;
  return dim3(unsigned(blocks < 1 ? 1 : blocks));
}
__device__ __forceinline__ unsigned norm_unit(int threads) {
  const int log = __ffs(threads) - 1;
  return threads > 32 ? blockIdx.x : blockIdx.x * (kNormSmallBlock >> log) + (threadIdx.x >> log);
}
__device__ __forceinline__ unsigned norm_lane(int threads) {   // of the group's threads
  return threads > 32 ? threadIdx.x : threadIdx.x & (threads - 1);
}

// A row by its two outer indices.
struct Outer {
  unsigned o, i;
  __device__ __forceinline__ Outer(int64_t row, int64_t inner)
      : o(unsigned(row) / unsigned(inner)), i(unsigned(row) % unsigned(inner)) {}
  __device__ __forceinline__ int64_t in(const View& x) const { return o * x.stride[0] + i * x.stride[1]; }
};

// The threads of one group must all call, and those of their warp. All get the same bits.
__device__ __forceinline__ float norm_sum(float x, int threads) {
  __shared__ float warp_total[kNormMost / 32];
  for (int lane = min(threads, 32) / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  if (threads <= 32) return x;
  if (threadIdx.x % 32 == 0) warp_total[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < threads / 32; ++warp) total += warp_total[warp];
  __syncthreads();   // warp_total is read above, written by the next call
  return total;
}

__device__ __forceinline__ ushort bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ ushort bits(__half x) { return __half_as_ushort(x); }

// Kernels are compiled for E, a 16-bit dtype: each of their tensors is E or float32, and consists of whole, aligned
// vectors. The one for E = void takes any others, element by element. At run time a dtype has at most one branch: of
// three, compilers make jump tables.
template <class E> constexpr bool vectorised = !std::is_void_v<E>;

// n elements as they lie in memory. Converting them where they are used, not where they are loaded, keeps the loads of
// several tensors in flight. Of `count` elements the first n, zeros beyond.
struct Raw { uint4 low{}, high{}; };

template <class E> __device__ __forceinline__ Raw load_raw(const View& x, int64_t offset, int64_t count) {
  const bool wide = x.type == DType::f32;
  const char* const p = static_cast<const char*>(x.data) + (offset << (wide ? 2 : 1));
  uint4 raw[2]{};
  if constexpr (vectorised<E>) {
    raw[0] = *reinterpret_cast<const uint4*>(p);
    if (wide) raw[1] = *reinterpret_cast<const uint4*>(p + 16);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (wide && i < count) reinterpret_cast<unsigned*>(raw)[i] = reinterpret_cast<const unsigned*>(p)[i];
      if (!wide && i < count) reinterpret_cast<ushort*>(raw)[i] = reinterpret_cast<const ushort*>(p)[i];
    }
  }
  return {raw[0], raw[1]};
}

template <class T> __device__ __forceinline__ Vec<n> unpack_as(const Raw& raw) {
  const uint4 word[2] = {raw.low, raw.high};
  Vec<n> x;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = load(reinterpret_cast<const T*>(word) + i);
  return x;
}
template <class E> __device__ __forceinline__ Vec<n> unpack(const Raw& raw, DType type) {
  if (type == DType::f32) return unpack_as<float>(raw);
  if constexpr (vectorised<E>) {
    return unpack_as<E>(raw);
  } else {
    Vec<n> x = unpack_as<__nv_bfloat16>(raw);
    const Vec<n> half = unpack_as<__half>(raw);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = type == DType::bf16 ? x[i] : half[i];
    return x;
  }
}

template <class T> __device__ __forceinline__ Raw pack_as(const Vec<n>& x) {
  uint4 word[2]{};
#pragma unroll
  for (int i = 0; i < n; ++i) store(reinterpret_cast<T*>(word) + i, x[i]);
  return {word[0], word[1]};
}

// Of `count` elements the first n.
template <class E>
__device__ __forceinline__ void store_as(const View& y, int64_t offset, const Vec<n>& x, int64_t count) {
  const bool wide = y.type == DType::f32;
  char* const p = static_cast<char*>(y.data) + (offset << (wide ? 2 : 1));
  if constexpr (vectorised<E>) {
    const Raw raw = wide ? pack_as<float>(x) : pack_as<E>(x);
    reinterpret_cast<uint4*>(p)[0] = raw.low;
    if (wide) reinterpret_cast<uint4*>(p)[1] = raw.high;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const ushort narrow = y.type == DType::bf16 ? bits(__float2bfloat16_rn(x[i])) : bits(__float2half_rn(x[i]));
      if (wide && i < count) reinterpret_cast<float*>(p)[i] = x[i];
      if (!wide && i < count) reinterpret_cast<ushort*>(p)[i] = narrow;
    }
  }
}

// n of the floats from p on.
template <class E> __device__ __forceinline__ Vec<n> load_floats(const float* p, int64_t count) {
  return load_vec<n>({const_cast<float*>(p), DType::f32, {}}, 0, vectorised<E>, vectorised<E> ? n : count);
}
template <class E> __device__ __forceinline__ void store_floats(float* p, const Vec<n>& x, int64_t count) {
  store_vec<n>({p, DType::f32, {}}, 0, x, vectorised<E>, vectorised<E> ? n : count);
}

// f<E>() with the E whose kernel the tensors may take; an absent one fits any.
template <class F> int for_dtype(int64_t group, const float* weight, std::initializer_list<View> tensors, const F& f) {
  bool whole = group % n == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0, bf16 = false, f16 = false;
  for (const View& t : tensors) {
    whole = whole && (!t || vectorisable(t, n, 2));
    bf16 = bf16 || (t && t.type == DType::bf16), f16 = f16 || (t && t.type == DType::f16);
  }
  if (!whole || (bf16 && f16)) return f.template operator()<void>();
  return f16 ? f.template operator()<__half>() : f.template operator()<__nv_bfloat16>();
}

}  // namespace
}  // namespace pyseq
