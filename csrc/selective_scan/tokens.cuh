// How a warp of the forward brings in its tokens, in tiles of kTokens.
//
// A thread copies 4 neighbouring elements at a time, as they are, to where they wait in shared memory while the tile before is
// computed. Converted, they are left there as delta, delta u, B and C in float32. No warp waits for another: the barriers are
// those of a warp.
#pragma once
#include "cuda/async.cuh"
#include "selective_scan/forward.cuh"

namespace pyseq {
namespace {

template <int L> struct Tokens {
  using Place = Floats<L>;
  static constexpr int kPasses = kTokens<L> / L;               // a warp copies L rows at a time
  static constexpr int kFours = (kShared<L> / 4 + 31) / 32;    // fours of B for each thread

  const SelectiveScan& s;
  const Layout& at;
  unsigned char* memory;
  int end, lane;

  __device__ __forceinline__ const Walk& walk() const { return *reinterpret_cast<const Walk*>(memory); }
  __device__ __forceinline__ void set(const Tile& tile, int row) const {
    if (lane == 0) {
      Walk& walk = *reinterpret_cast<Walk*>(memory);
      walk.tile = tile;
      walk.row = row;
      for (int i = 0; i < 3; ++i) walk.rows[i] = row * at.rows[i].x.stride[0] + tile.channel;
      for (int i = 0; i < 2; ++i)
        walk.shared[i] = row * at.shared[i].x.stride[0] + tile.group * at.shared[i].x.stride[2];
      walk.y = row * s.y.stride[0] + tile.channel;
    }
    __syncwarp();
  }
  // The first of the 4 channels that this thread copies, how many of them there are, and its first token in a tile.
  __device__ __forceinline__ int channel() const { return walk().tile.channel + lane % (32 / L) * 4; }
  __device__ __forceinline__ int channels() const { return within(4, walk().tile.channels - lane % (32 / L) * 4); }
  __device__ __forceinline__ int first() const { return lane / (32 / L); }
  __device__ __forceinline__ Corner corner(int slice) const { return corner_of<L>(walk().tile, lane, slice, int(s.states)); }
  // How many tokens of a tile there are.
  __device__ __forceinline__ int left(int begin) const { return within(kTokens<L>, end - begin); }

  __device__ __forceinline__ float* floats(int at) const { return reinterpret_cast<float*>(memory) + at; }
  __device__ __forceinline__ View raw(const Stream& x, int stage = 0) const {
    return {memory + x.raw + stage * x.stage, x.x.type, {}};
  }
  __device__ __forceinline__ Vec<4> of_channels(const float* p) const {
    Vec<4> x;
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = p && c < channels() ? p[channel() + c] : 0.f;
    return x;
  }

  // Copies `kTimes` times 4 elements, `step` bytes apart; zeros for those from `count` on, and all of them from `rows` on.
  // What cannot be one access is not worth overlapping. The copies do not ask what a number means, only how long it is.
  template <int kTimes, int kTokensEach>
  __device__ __forceinline__ void fetch(const Stream& x, int stage, int64_t offset, int rows, int count) const {
    const int size = int(size_of(x.x.type));
    const int64_t step = kTokensEach * x.x.stride[1] * size;
    unsigned char* to = memory + x.raw + stage * x.stage + lane * 4 * size;
    const unsigned char* from = static_cast<const unsigned char*>(x.x.data) + offset * size;
    if (x.wide) {
#pragma unroll
      for (int k = 0; k < kTimes; ++k, from += step, to += 128 * size) {
        const int used = k * kTokensEach < rows ? count * size : 0;
        if (size == 4) cp_async<16>(to, from, used);
        else cp_async<8>(to, from, used);
      }
      return;
    }
#pragma unroll 1
    for (int k = 0; k < kTimes; ++k, from += step, to += 128 * size) {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const bool there = k * kTokensEach < rows && i < count;
        if (size == 4) reinterpret_cast<uint32_t*>(to)[i] = there ? reinterpret_cast<const uint32_t*>(from)[i] : 0u;
        else reinterpret_cast<uint16_t*>(to)[i] = there ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t(0);
      }
    }
  }

  // What comes next is on its way while this tile is computed. One copy of the code serves all tensors.
  template <bool kOutput> __device__ __forceinline__ void fetch_rows(int begin, int stage) const {
#pragma unroll 1
    for (int i = 0; i < (kOutput && s.z ? 3 : 2); ++i) {
      const View& x = at.rows[i].x;
      const int64_t offset = walk().rows[i] + (begin + first()) * x.stride[1] + lane % (32 / L) * 4;
      fetch<kPasses, L>(at.rows[i], stage, offset, left(begin) - first(), channels());
    }
  }
  template <bool kOutput> __device__ __forceinline__ void fetch_shared(int begin, int slice) const {
    if (kFours == 1 && lane * 4 >= kShared<L>) return;
    const int token = lane / L, state = slice * kTileStates<L> + lane % L * 4;
#pragma unroll 1
    for (int i = 0; i < (kOutput ? 2 : 1); ++i) {
      const View& x = at.shared[i].x;
      const int64_t offset = walk().shared[i] + (begin + token) * x.stride[1] + state;
      fetch<kFours, 32 / L>(at.shared[i], 0, offset, left(begin) - token, within(4, int(s.states) - state));
    }
  }

  // delta and du of the tile; adds delta to sums. Tokens after the end get delta = du = 0, which leaves h as it is.
  __device__ __forceinline__ void convert_rows(int begin, int stage, Vec<4>& sums) const {
    const View dt = raw(at.rows[0]), u = raw(at.rows[1], stage);
    const Vec<4> bias = of_channels(s.dt_bias);
    const int rows = left(begin) - first();
#pragma unroll 1
    for (int k = 0; k < kPasses; ++k) {
      const int four = (k * 32 + lane) * 4;
      Vec<4> delta = load_vec<4>(dt, four, true), du = load_vec<4>(u, four, true);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        delta[c] += bias[c];
        if (s.dt_softplus) delta[c] = softplus(delta[c]);
        delta[c] = k * L < rows ? delta[c] : 0.f;
        du[c] *= delta[c];
        sums[c] += delta[c];
      }
      store_vec<4>(floats(Place::kDelta) + four, delta);
      store_vec<4>(floats(Place::kDu) + four, du);
    }
  }
  __device__ __forceinline__ void convert_shared(const Stream& x, int to) const {
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      const int four = (k * 32 + lane) * 4;
      if (kFours > 1 || four < kShared<L>) store_vec<4>(floats(to) + four, load_vec<4>(raw(x), four, true));
    }
  }

  // y of the tile, with skip and gate.
  __device__ __forceinline__ void store_rows(int begin, int stage) const {
    const View u = raw(at.rows[1], stage), z = raw(at.rows[2], stage);
    const Vec<4> D = of_channels(s.D);
    const int rows = left(begin) - first();
    int64_t to = walk().y + (begin + first()) * s.y.stride[1] + lane % (32 / L) * 4;
#pragma unroll 1
    for (int k = 0; k < kPasses; ++k, to += L * s.y.stride[1]) {
      const int four = (k * 32 + lane) * 4;
      Vec<4> y = load_vec<4>(floats(Place::kY) + four);
      const Vec<4> skip = load_vec<4>(u, four, true);
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = fmaf(D[c], skip[c], y[c]);
      if (s.z) {
        const Vec<4> gate = load_vec<4>(z, four, true);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] *= silu(gate[c]);
      }
      if (k * L < rows) store_vec<4>(s.y, to, y, at.wide_y, channels());
    }
  }
};

}  // namespace
}  // namespace pyseq
