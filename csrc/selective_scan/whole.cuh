// The same where all tiles are whole and of one 16-bit dtype T, as those of Mamba are: there is nothing to ask of a dtype, a
// channel or a state, and a thread copies 16 bytes at a time, which other threads may convert. The bits are those of Tokens.
#pragma once
#include "selective_scan/tokens.cuh"

namespace pyseq {
namespace {

// Four neighbours, by one instruction each: bfloat16 is the upper half of a float.
__device__ __forceinline__ Vec<4> load_four(const __nv_bfloat16* p) {
  const uint2 words = *reinterpret_cast<const uint2*>(p);
  const auto low = [](unsigned word) { return __uint_as_float(word << 16); };
  const auto high = [](unsigned word) { return __uint_as_float(word & 0xffff0000u); };
  return {low(words.x), high(words.x), low(words.y), high(words.y)};
}

// Whether all tiles are such. Offsets within a tile are int.
template <int L, class T> bool whole(const SelectiveScan& s, DType type) {
  const auto fits = [&](const View& x, int axes) {
    return !x || (x.type == type && vectorisable(x, 16 / int(sizeof(T)), axes) && x.stride[1] < kLongest / 16);
  };
  const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return s.states == kTileStates<L> && s.dim / s.groups % kTileChannels<L> == 0 && fits(s.u, 2) && fits(s.dt, 2) &&
         fits(s.z, 2) && fits(s.y, 2) && fits(s.B, 3) && fits(s.C, 3) && aligned(s.D) && aligned(s.dt_bias);
}

template <int L, class T> struct WholeTokens : Tokens<L> {
  using Base = Tokens<L>;
  using Place = typename Base::Place;
  using Base::at, Base::channel, Base::first, Base::floats, Base::lane, Base::left, Base::memory, Base::s, Base::walk;

  __device__ __forceinline__ int channels() const { return 4; }
  __device__ __forceinline__ Corner corner(int) const {
    return {walk().tile.channel + lane / L * 4, 4, lane % L * 4, 4};
  }
  __device__ __forceinline__ const T* raw(const Stream& x, int stage = 0) const {
    return reinterpret_cast<const T*>(memory + x.raw + stage * x.stage);
  }
  __device__ __forceinline__ Vec<4> of_channels(const float* p) const { return p ? load_vec<4>(p + channel()) : Vec<4>{}; }

  // `from` is where a tile of kWidth elements begins in the row; zeros for tokens after the end.
  template <int kWidth>
  __device__ __forceinline__ void copy(const Stream& x, int stage, int64_t from, int begin) const {
    constexpr int kEach = 16 / int(sizeof(T)), kAcross = kWidth / kEach, kTokensEach = 32 / kAcross;
    const int token = lane / kAcross, stride = int(x.x.stride[1]), rows = left(begin) - token;
    const T* p = static_cast<const T*>(x.x.data) + from + lane % kAcross * kEach + int64_t(begin + token) * stride;
    unsigned char* const to = memory + x.raw + stage * x.stage + lane * 16;
#pragma unroll
    for (int k = 0; k < kTokens<L> / kTokensEach; ++k, p += kTokensEach * stride)
      cp_async<16>(to + k * 512, p, k * kTokensEach < rows ? 16 : 0);
  }
  template <bool kOutput> __device__ __forceinline__ void fetch_rows(int begin, int stage) const {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (i < 2 || (kOutput && s.z)) copy<kTileChannels<L>>(at.rows[i], stage, walk().rows[i], begin);
  }
  template <bool kOutput> __device__ __forceinline__ void fetch_shared(int begin, int) const {
#pragma unroll
    for (int i = 0; i < (kOutput ? 2 : 1); ++i)
      copy<kTileStates<L>>(at.shared[i], 0, walk().shared[i], begin);
  }

  template <bool kSoftplus> __device__ __forceinline__ void convert(int rows, const T* dt, const T* u, Vec<4>& sums) const {
    const Vec<4> bias = of_channels(s.dt_bias);
#pragma unroll
    for (int k = 0; k < Base::kPasses; ++k) {
      const int four = (k * 32 + lane) * 4;
      Vec<4> delta = load_four(dt + four), du = load_four(u + four);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        delta[c] += bias[c];
        if (kSoftplus) delta[c] = softplus(delta[c]);
        delta[c] = k * L < rows ? delta[c] : 0.f;
        du[c] *= delta[c];
        sums[c] += delta[c];
      }
      store_vec<4>(floats(Place::kDelta) + four, delta);
      store_vec<4>(floats(Place::kDu) + four, du);
    }
  }
  __device__ __forceinline__ void convert_rows(int begin, int stage, Vec<4>& sums) const {
    const T *const dt = raw(at.rows[0]), *const u = raw(at.rows[1], stage);
    const int rows = left(begin) - first();
    if (s.dt_softplus) convert<true>(rows, dt, u, sums);
    else convert<false>(rows, dt, u, sums);
  }
  __device__ __forceinline__ void convert_shared(const Stream& x, int to) const {
#pragma unroll
    for (int k = 0; k < Base::kFours; ++k) {
      const int four = (k * 32 + lane) * 4;
      store_vec<4>(floats(to) + four, load_four(raw(x) + four));
    }
  }

  template <bool kGate> __device__ __forceinline__ void store(int begin, const T* u, const T* z) const {
    const Vec<4> D = of_channels(s.D);
    const int rows = left(begin) - first(), stride = int(s.y.stride[1]);
    T* to = static_cast<T*>(s.y.data) + walk().y + lane % (32 / L) * 4 + int64_t(begin + first()) * stride;
#pragma unroll 2
    for (int k = 0; k < Base::kPasses; ++k, to += L * stride) {
      const int four = (k * 32 + lane) * 4;
      Vec<4> y = load_vec<4>(floats(Place::kY) + four);
      const Vec<4> skip = load_four(u + four), gate = kGate ? load_four(z + four) : Vec<4>{};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        y[c] = fmaf(D[c], skip[c], y[c]);
        if (kGate) y[c] *= silu(gate[c]);
      }
      if (k * L < rows) store_vec<4>(to, y);
    }
  }
  __device__ __forceinline__ void store_rows(int begin, int stage) const {
    const T* const u = raw(at.rows[1], stage);
    if (s.z) store<true>(begin, u, raw(at.rows[2], stage));
    else store<false>(begin, u, nullptr);
  }
};

}  // namespace
}  // namespace pyseq
