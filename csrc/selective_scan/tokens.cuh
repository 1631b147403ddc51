// How a warp of the forward brings in its tokens, in tiles of kTokens.
//
// A thread copies 4 neighbouring elements at a time, as they are, to a place in shared memory that is its own; there they
// wait while the tile before is computed. It converts them itself and leaves delta, delta u, B and C as float32 for the
// warp. No warp waits for another: the barriers are those of a warp.
#pragma once
#include "selective_scan/update.cuh"

namespace pyseq {
namespace {

template <int L> constexpr int kTokens = L < 4 ? 4 * L : 16;
template <int L> constexpr int kRows = kTokens<L> * kTileChannels<L>;     // elements of a tile of u
template <int L> constexpr int kShared = kTokens<L> * kTileStates<L>;     // elements of a tile of B
template <int L> constexpr bool kSlices = L == 16;                        // there may be more slices than one

// Shared memory of a warp: bytes from its beginning. B, C and dt are converted before the next tile is asked for; u and z
// are needed once more at the end of theirs, so they have two places each. y takes the place of du unless slices follow.
struct Layout {
  int delta, du, y, B, C, raw_dt, raw_B, raw_C, raw_u, raw_z, bytes;
};

template <int L> Layout layout(const SelectiveScan& s) {
  Layout at{};
  const auto take = [&](int64_t bytes) {
    const int begin = at.bytes;
    at.bytes += int(bytes);
    return begin;
  };
  at.delta = take(kRows<L> * 4);
  at.du = take(kRows<L> * 4);
  at.y = kSlices<L> ? take(kRows<L> * 4) : at.du;
  at.B = take(kShared<L> * 4);
  at.C = take(kShared<L> * 4);
  at.raw_dt = take(kRows<L> * size_of(s.dt.type));
  at.raw_B = take(kShared<L> * size_of(s.B.type));
  at.raw_C = take(kShared<L> * size_of(s.C.type));
  at.raw_u = take(2 * kRows<L> * size_of(s.u.type));
  at.raw_z = s.z ? take(2 * kRows<L> * size_of(s.z.type)) : 0;
  return at;
}

// Which tensors may be read 4 elements at a time.
struct Wide {
  bool u, dt, z, y, B, C;
};

inline Wide wide(const SelectiveScan& s) {
  const bool aligned = s.groups == 1 || s.dim / s.groups % 4 == 0;   // the first channel of every group
  const auto rows = [&](const View& x) { return aligned && vectorisable(x, 4, 2); };
  return {rows(s.u), rows(s.dt), rows(s.z), rows(s.y), vectorisable(s.B, 4, 3), vectorisable(s.C, 4, 3)};
}

// Four elements of x to `slot` of raw memory; zeros where fewer exist.
__device__ __forceinline__ void fetch(unsigned char* raw, int slot, const View& x, int64_t offset, int count, bool wide) {
  store_vec<4>(View{raw, x.type, {}}, slot * 4, load_vec<4>(x, offset, wide, count), true);
}

template <int L> struct Tokens {
  static constexpr int kPasses = kTokens<L> / L;                     // a warp copies L rows at a time
  static constexpr int kFours = (kShared<L> / 4 + 31) / 32;          // fours of B for each thread

  const SelectiveScan& s;
  const Layout& at;
  const Wide& wide;
  unsigned char* memory;
  int64_t row, end, group, channel;   // channel: the first of the 4 that this thread copies
  int lane, first, channels;          // first: its first token in a tile

  __device__ __forceinline__ Tokens(const SelectiveScan& s, const Layout& at, const Wide& wide, unsigned char* memory,
                                    const Tile& tile, int64_t row, int64_t end, int lane)
      : s(s), at(at), wide(wide), memory(memory), row(row), end(end), group(tile.group),
        channel(tile.channel + lane % (32 / L) * 4), lane(lane), first(lane / (32 / L)),
        channels(tile.channels - lane % (32 / L) * 4) {}

  __device__ __forceinline__ float* floats(int bytes) const { return reinterpret_cast<float*>(memory + bytes); }
  __device__ __forceinline__ View raw(int bytes, const View& x) const { return {memory + bytes, x.type, {}}; }
  __device__ __forceinline__ View raw(int bytes, const View& x, int stage) const {
    return raw(bytes + stage * kRows<L> * int(size_of(x.type)), x);
  }
  __device__ __forceinline__ int64_t offset(const View& x, int64_t t) const {
    return row * x.stride[0] + t * x.stride[1] + channel;
  }
  __device__ __forceinline__ bool has(int64_t t) const { return t < end && channels > 0; }

  __device__ __forceinline__ void fetch_rows(const View& x, bool wide, const View& to, int64_t begin) const {
    int64_t from = offset(x, begin + first);
#pragma unroll
    for (int k = 0; k < kPasses; ++k, from += L * x.stride[1])
      if (has(begin + k * L + first)) fetch(static_cast<unsigned char*>(to.data), k * 32 + lane, x, from, channels, wide);
  }

  __device__ __forceinline__ void fetch_shared(const View& x, bool wide, const View& to, int64_t begin, int64_t slice) const {
    const int64_t from = row * x.stride[0] + group * x.stride[2];
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      const int four = k * 32 + lane;
      const int64_t t = begin + four / L, n = slice * kTileStates<L> + four % L * 4;
      if (four * 4 < kShared<L> && t < end && n < s.states)
        fetch(static_cast<unsigned char*>(to.data), four, x, from + t * x.stride[1] + n, int(min(s.states - n, int64_t(4))), wide);
    }
  }

  // delta and du of the tile; adds delta to sums.
  __device__ __forceinline__ void convert_rows(int64_t begin, int stage, const Vec<4>& bias, Vec<4>& sums) const {
    const View dt = raw(at.raw_dt, s.dt), u = raw(at.raw_u, s.u, stage);
#pragma unroll
    for (int k = 0; k < kPasses; ++k) {
      Vec<4> delta{}, du{};
      if (has(begin + k * L + first)) {
        delta = load_vec<4>(dt, (k * 32 + lane) * 4, true);
        du = load_vec<4>(u, (k * 32 + lane) * 4, true);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          delta[c] = s.dt_softplus ? softplus(delta[c] + bias[c]) : delta[c] + bias[c];
          du[c] *= delta[c];
          sums[c] += delta[c];
        }
      }
      store_vec<4>(floats(at.delta) + (k * 32 + lane) * 4, delta);
      store_vec<4>(floats(at.du) + (k * 32 + lane) * 4, du);
    }
  }

  __device__ __forceinline__ void convert_shared(const View& x, int from, int to, int64_t begin, int64_t slice) const {
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      const int four = k * 32 + lane;
      if (four * 4 >= kShared<L>) break;
      const bool there = begin + four / L < end && slice * kTileStates<L> + four % L * 4 < s.states;
      store_vec<4>(floats(to) + four * 4, there ? load_vec<4>(raw(from, x), four * 4, true) : Vec<4>{});
    }
  }

  // y of the tile, with skip and gate.
  __device__ __forceinline__ void store_rows(int64_t begin, int stage, const Vec<4>& D) const {
    const View u = raw(at.raw_u, s.u, stage), z = raw(at.raw_z, s.z, stage);
    int64_t to = offset(s.y, begin + first);
#pragma unroll
    for (int k = 0; k < kPasses; ++k, to += L * s.y.stride[1]) {
      if (!has(begin + k * L + first)) continue;
      const int four = (k * 32 + lane) * 4;
      Vec<4> y = load_vec<4>(floats(at.y) + four);
      const Vec<4> skip = load_vec<4>(u, four, true);
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = fmaf(D[c], skip[c], y[c]);
      if (s.z) {
        const Vec<4> gate = load_vec<4>(z, four, true);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] *= silu(gate[c]);
      }
      store_vec<4>(s.y, to, y, wide.y, channels);
    }
  }
};

}  // namespace
}  // namespace pyseq
