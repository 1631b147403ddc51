// States [K, V] of up to 256 keys in the registers of warps: a warp holds all keys of 128 / L columns, a thread 4 F
// keys of 4 columns. L neighbouring lanes hold the keys of the same columns, four by four.
#pragma once
#include "cuda/vector.cuh"

namespace pyseq {

template <int L> constexpr int kTileColumns = 128 / L;
template <int L, int F> constexpr int kTileKeys = 4 * L * F;

// f<L, F>() for the tile that K keys need.
template <class Function> auto for_keys(int64_t K, const Function& f) {
  if (K <= 16) return f.template operator()<4, 1>();
  if (K <= 64) return f.template operator()<8, 2>();
  if (K <= 128) return f.template operator()<8, 4>();
  return f.template operator()<16, 4>();
}

template <int F> struct StateTile {
  float v[4 * F][4];   // key, column
};

// The tile's place in memory: `at` is the thread's first column of key 0, of which there are `columns`.
template <int L, class T> struct TilePlace {
  T* at;
  int64_t stride;   // from key to key
  int lane, keys, columns;

  __device__ __forceinline__ int key(int i) const { return i / 4 * 4 * L + lane % L * 4 + i % 4; }
  __device__ __forceinline__ bool wide() const {
    constexpr int kBytes = access_bytes(4 * sizeof(T));
    return columns >= 4 && reinterpret_cast<uintptr_t>(at) % kBytes == 0 && stride * int64_t(sizeof(T)) % kBytes == 0;
  }
};

// All of it is under way before any is used. Beyond the edges the tile is zero.
template <int L, int F, class T>
__device__ __forceinline__ void load_tile(StateTile<F>& S, const TilePlace<L, T>& p) {
  const bool wide = p.wide();
#pragma unroll
  for (int i = 0; i < 4 * F; ++i) {
    const int key = p.key(i), columns = key < p.keys ? p.columns : 0;
    const T* const from = p.at + key * p.stride;
    const Vec<4> x = wide && columns >= 4 ? load_vec<4>(from) : Vec<4>{};
#pragma unroll
    for (int c = 0; c < 4; ++c) S.v[i][c] = wide ? x[c] : c < columns ? load(from + c) : 0.f;
  }
}

template <int L, int F, class T>
__device__ __forceinline__ void store_tile(const StateTile<F>& S, const TilePlace<L, T>& p) {
  const bool wide = p.wide();
#pragma unroll
  for (int i = 0; i < 4 * F; ++i) {
    const int key = p.key(i), columns = key < p.keys ? p.columns : 0;
    T* const to = p.at + key * p.stride;
    if (wide && columns >= 4) {
      store_vec<4>(to, Vec<4>{S.v[i][0], S.v[i][1], S.v[i][2], S.v[i][3]});
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < columns) store(to + c, S.v[i][c]);
    }
  }
}

template <int F> __device__ __forceinline__ void fill_tile(StateTile<F>& S, float x) {
#pragma unroll
  for (int i = 0; i < 16 * F; ++i) S.v[i / 4][i % 4] = x;
}

}  // namespace pyseq
