// What must wait for all of the first launch: the norm, a block for each of its groups, and the samples of B and C, which
// move on by one, a thread a channel.
#include "cuda/reduce.cuh"
#include "mamba2_step/update.cuh"

namespace pyseq {
namespace {

constexpr int kThreads = 256, kEach = 4, kHeld = 8, kAtOnce = kThreads * kEach;   // 8192 channels stay in registers

__device__ __forceinline__ void normalise(const Mamba2Step& s, bool wide, int unit) {
  const int groups = int(s.dim() / s.norm_group), size = int(s.norm_group);
  const int64_t row = unit / groups, first = int64_t(unit % groups) * size;
  const float* const v = s.v + row * s.dim() + first;
  const auto read = [&](int i) {
    const View from{const_cast<float*>(v), DType::f32, {}};
    return load_vec<kEach>(from, i, wide, size - i);
  };
  Vec<kEach> held[kHeld];
  float squares = 0.f;
  const auto add = [&](const Vec<kEach>& x) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) squares = fmaf(x[e], x[e], squares);
  };
  const int mine = int(threadIdx.x) * kEach;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) held[k] = read(mine + k * kAtOnce);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) add(held[k]);
#pragma unroll 1
  for (int i = mine + kHeld * kAtOnce; i < size; i += kAtOnce) add(read(i));
  const float scale = rsqrtf(block_sum<kThreads>(squares) / float(size) + s.eps);
  const auto write = [&](int i, const Vec<kEach>& x) {
    if (i >= size) return;
    const Vec<kEach> weight = load_vec<kEach>(s.norm_weight, first + i, wide, size - i);
    Vec<kEach> gate{}, y;
    if (s.z && s.norm_before_gate) gate = load_vec<kEach>(s.z, row * s.z.stride[0] + first + i, wide, size - i);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      y[e] = x[e] * scale * weight[e];
      if (s.z && s.norm_before_gate) y[e] *= silu(gate[e]);
    }
    store_vec<kEach>(s.y, row * s.y.stride[0] + first + i, y, wide, size - i);
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) write(mine + k * kAtOnce, held[k]);
#pragma unroll 1
  for (int i = mine + kHeld * kAtOnce; i < size; i += kAtOnce) write(i, read(i));
}

__global__ void __launch_bounds__(kThreads) mamba2_step_finish_kernel(Mamba2Step s, bool wide, int norms) {
  if (int(blockIdx.x) < norms) return normalise(s, wide, int(blockIdx.x));
  const int64_t i = int64_t(int(blockIdx.x) - norms) * kThreads + threadIdx.x, shared = 2 * s.groups * s.states;
  if (i >= s.batch * shared) return;
  with_types(s, [&]<class X, class M>() { Window<X, M>(s, i / shared, s.dim() + i % shared).move(); });
}

}  // namespace

int mamba2_step_finish_cuda(const Mamba2Step& s, void* stream) {
  const int64_t norms = s.norm_group ? s.batch * (s.dim() / s.norm_group) : 0;
  const int64_t moved = s.taps > 1 ? (s.batch * 2 * s.groups * s.states + kThreads - 1) / kThreads : 0;
  if (norms + moved > kLongest) return cudaErrorInvalidValue;
  if (norms + moved == 0) return 0;
  const bool wide = s.norm_group % kEach == 0 && vectorisable(s.y, kEach, 1) && vectorisable(s.z, kEach, 1) &&
                    vectorisable(s.norm_weight, kEach, 0);
  return launch<mamba2_step_finish_kernel>(dim3(unsigned(norms + moved)), dim3(kThreads), 0, stream, s, wide, int(norms));
}

}  // namespace pyseq
