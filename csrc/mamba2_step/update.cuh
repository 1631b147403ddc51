// The convolution of one channel, and its samples.
#pragma once
#include "cuda/device.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "mamba2_step/kernel.h"

namespace pyseq {
namespace {

constexpr int64_t kLongest = 1 << 30;   // places along an axis are int, offsets into memory int64_t

// The samples of a channel of a row, the newest first, kTaps of them in registers: widths in use have no more. X and M are
// the dtypes of xBC and of the samples.
constexpr int kTaps = 4;
template <class X, class M> struct Window {
  M* state;
  int past;
  float sample[kTaps];

  __device__ __forceinline__ Window(const Mamba2Step& s, int64_t row, int64_t channel)
      : state(static_cast<M*>(s.conv_state.data) + row * s.conv_state.stride[0] + channel * s.conv_state.stride[1]),
        past(int(s.taps) - 1) {
    sample[0] = load(static_cast<const X*>(s.xBC.data) + row * s.xBC.stride[0] + channel);
#pragma unroll
    for (int j = 1; j < kTaps; ++j) sample[j] = j <= past ? load(state + past - j) : 0.f;
  }
  __device__ __forceinline__ float convolve(const Mamba2Step& s, int64_t channel) const {
    const int64_t newest = channel * s.conv_weight.stride[0] + past;
    float a = s.conv_bias ? load(s.conv_bias, channel) : 0.f, weight[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) weight[j] = j <= past ? load(s.conv_weight, newest - j) : 0.f;
#pragma unroll 1   // no width in use comes here
    for (int k = 0; k <= past - kTaps; ++k) a = fmaf(load(s.conv_weight, newest - past + k), load(state + k), a);
#pragma unroll
    for (int j = kTaps - 1; j >= 0; --j) a = fmaf(weight[j], sample[j], a);
    return silu(a);
  }
  // By one. Whoever calls it must be the only one there.
  __device__ __forceinline__ void move() const {
#pragma unroll 1
    for (int k = 1; k <= past - kTaps; ++k) store(state + k - 1, load(state + k));
#pragma unroll
    for (int j = kTaps - 1; j >= 0; --j)
      if (j < past) store(state + past - 1 - j, sample[j]);
  }
};

// f<X, M>() for the dtypes of xBC and of the samples: one branch around a loop, and not one around each load.
template <class F> __device__ __forceinline__ void with_types(const Mamba2Step& s, const F& f) {
  const auto with_x = [&]<class X>() {
    if (s.conv_state.type == DType::f32) f.template operator()<X, float>();
    else f.template operator()<X, __nv_bfloat16>();
  };
  switch (s.xBC.type) {
    case DType::bf16: return with_x.template operator()<__nv_bfloat16>();
    case DType::f16: return with_x.template operator()<__half>();
    default: return with_x.template operator()<float>();
  }
}

}  // namespace
}  // namespace pyseq
