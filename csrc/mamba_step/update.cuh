// What both launches share: the convolution, and how a group of lanes shares out its sums.
#pragma once
#include "cuda/device.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "mamba_step/kernel.h"

namespace pyseq {
namespace {

// The taps of one channel, from the newest on: the first kTaps of them in registers, where widths in use end.
constexpr int kTaps = 4;
struct Channel {
  float weight[kTaps] = {}, bias = 0.f;

  __device__ Channel(const MambaStep& s, int64_t channel) {
    const int64_t newest = channel * s.conv_weight.stride[0] + s.width - 1;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      if (j < s.width) weight[j] = load(s.conv_weight, newest - j);
    }
    if (s.conv_bias) bias = load(s.conv_bias, channel);
  }
};

// u of one channel of one row, with x and the state in their dtypes. With `shift` the samples move on by one: whoever
// says so must be the only one there.
template <bool shift, class X, class S>
__device__ __forceinline__ float convolve(const MambaStep& s, const Channel& c, int64_t row, int64_t channel) {
  const int past = int(s.width) - 1;
  S* const state = static_cast<S*>(s.conv_state.data) + row * s.conv_state.stride[0] + channel * s.conv_state.stride[1];
  float sample[kTaps] = {load(static_cast<const X*>(s.x.data) + row * s.x.stride[0] + channel)}, a = c.bias;
#pragma unroll
  for (int j = 1; j < kTaps; ++j) {
    if (j <= past) sample[j] = load(state + past - j);
  }
#pragma unroll 1   // no width in use comes here
  for (int k = 0; k <= past - kTaps; ++k) {
    const float v = load(state + k);
    a = fmaf(load(s.conv_weight, channel * s.conv_weight.stride[0] + k), v, a);
    if (shift && k > 0) store(state + k - 1, v);
  }
#pragma unroll
  for (int j = kTaps - 1; j >= 0; --j) {
    a = fmaf(c.weight[j], sample[j], a);
    if (shift && j < past) store(state + past - 1 - j, sample[j]);
  }
  return silu(a);
}

// f<X, S>() for the dtypes of x and the convolution's state: one branch around a loop, and not one around each load.
template <class F> __device__ __forceinline__ void with_types(const MambaStep& s, const F& f) {
  const auto with_x = [&]<class X>() {
    if (s.conv_state.type == DType::f32) f.template operator()<X, float>();
    else f.template operator()<X, __nv_bfloat16>();
  };
  switch (s.x.type) {
    case DType::bf16: return with_x.template operator()<__nv_bfloat16>();
    case DType::f16: return with_x.template operator()<__half>();
    default: return with_x.template operator()<float>();
  }
}

// Sums each of n values over groups of `lanes` neighbouring lanes, n a multiple of lanes, both powers of two. Lane q
// of a group is left with the sums q n / lanes to (q + 1) n / lanes, from v[0] on: half of the values are given away
// for half of the others, log2(lanes) times. All lanes of the warp must call.
template <int lanes, int n> __device__ __forceinline__ void share_sums(float (&v)[n]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int bit = lanes / 2, half = n / 2; bit > 0; bit /= 2, half /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      if (i < half) {
        const float mine = upper ? v[i + half] : v[i], other = upper ? v[i] : v[i + half];
        v[i] = mine + __shfl_xor_sync(~0u, other, bit);
      }
    }
  }
}

}  // namespace
}  // namespace pyseq
