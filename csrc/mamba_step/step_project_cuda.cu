// [low, B, C] = W_x u, in parts: one block adds up the products of kMambaChunk channels, for kBatch rows of the batch.
//
// A warp owns 256 channels. It computes their u (the convolution is cheap, and nobody else needs u in memory), then
// holds 8 channels a lane in registers, for every row, while the rows of W_x stream by: each is read once for kBatch
// rows. 32 sums at a time, kBatch rows times 32 / kBatch outputs, are shared out over the lanes, one each, and added
// up over the warps in order. Reads the convolution's state, writes only `projected`.
#include "mamba_step/update.cuh"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kLaneChannels = 8, kWarpChannels = 32 * kLaneChannels;
static_assert(kWarps * kWarpChannels == kMambaChunk);

// Where the four channels of one half of a lane's eight lie among u: as far apart as keeps lanes that store or load at
// once in different banks.
__device__ __forceinline__ int slot(int lane, int half) {
  return half * (kWarpChannels / 2) + (lane ^ half * kLaneChannels / 2) * (kLaneChannels / 2);
}

template <class T, int kBatch>
__device__ __forceinline__ void products(const MambaStep& s, const float* u_of_warp, bool vectorised, int64_t split,
                                         int64_t splits, int64_t chunk, int64_t first) {
  constexpr int kOut = 32 / kBatch;
  __shared__ float shared[2][kWarps][32];   // two, so that one barrier per round is enough
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel = chunk * kMambaChunk + warp * kWarpChannels + lane * kLaneChannels;
  const int64_t left = s.dim - channel, outputs = s.outputs(), rounds = (outputs + kOut - 1) / kOut;
  Vec<kLaneChannels> u[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec<kLaneChannels / 2> some = load_vec<kLaneChannels / 2>(u_of_warp + b * kWarpChannels + slot(lane, half));
#pragma unroll
      for (int i = 0; i < kLaneChannels / 2; ++i) u[b][half * kLaneChannels / 2 + i] = some[i];
    }
  }
  int buffer = 0;
  for (int64_t round = split; round < rounds; round += splits, buffer ^= 1) {
    Vec<kLaneChannels> w[kOut];
#pragma unroll
    for (int o = 0; o < kOut; ++o) {   // behind the last output the last one again: its sum is not stored
      const int64_t output = round * kOut + o < outputs ? round * kOut + o : outputs - 1;
      const T* const p = static_cast<const T*>(s.x_proj.data) + output * s.x_proj.stride[0] + channel;
      if (vectorised && left >= kLaneChannels) {
        w[o] = load_vec<kLaneChannels>(p);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) w[o][i] = i < left ? load(p + i) : 0.f;
      }
    }
    float sum[32];
#pragma unroll
    for (int o = 0; o < kOut; ++o) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) total = fmaf(w[o][i], u[b][i], total);
        sum[o * kBatch + b] = total;
      }
    }
    share_sums<32>(sum);
    shared[buffer][warp][lane] = sum[0];
    __syncthreads();
    if (warp == 0) {
      const int64_t output = round * kOut + lane / kBatch, row = first + lane % kBatch;
      float total = 0.f;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) total += shared[buffer][k][lane];
      if (output < outputs && row < s.batch) s.projected[(chunk * s.batch + row) * outputs + output] = total;
    }
  }
}

template <int kBatch>
__global__ void __launch_bounds__(kThreads, 2) mamba_step_project_kernel(MambaStep s, int64_t splits, bool vectorised) {
  __shared__ __align__(16) float shared_u[kWarps][kBatch * kWarpChannels];
  const int64_t chunks = mamba_chunks(s.dim), split = blockIdx.x % splits, chunk = blockIdx.x / splits % chunks;
  const int64_t first = blockIdx.x / splits / chunks * kBatch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const u = shared_u[warp];
  with_types(s, [&]<class X, class S>() {
    for (int i = lane; i < kWarpChannels; i += 32) {   // neighbouring lanes, neighbouring channels
      // Behind the last row the last one again, whose sum is not stored; behind the last channel zeros.
      const int64_t own = chunk * kMambaChunk + warp * kWarpChannels + i, channel = own < s.dim ? own : s.dim - 1;
      const Channel c(s, channel);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t row = first + b < s.batch ? first + b : s.batch - 1;
        const float at_row = convolve<false, X, S>(s, c, row, channel);
        u[b * kWarpChannels + slot(i / 8, i / 4 % 2) + i % 4] = own < s.dim ? at_row : 0.f;
      }
    }
  });
  __syncwarp();
  switch (s.x_proj.type) {
    case DType::bf16: return products<__nv_bfloat16, kBatch>(s, u, vectorised, split, splits, chunk, first);
    case DType::f16: return products<__half, kBatch>(s, u, vectorised, split, splits, chunk, first);
    default: return products<float, kBatch>(s, u, vectorised, split, splits, chunk, first);
  }
}

template <int kBatch> int project(const MambaStep& s, void* stream) {
  constexpr int64_t kResident = 2 * 132;   // blocks of an H200
  const int64_t blocks = mamba_chunks(s.dim) * ((s.batch + kBatch - 1) / kBatch);
  const int64_t rounds = (s.outputs() * kBatch + 31) / 32, fit = blocks < kResident ? kResident / blocks : 1;
  const int64_t splits = fit < rounds ? fit : rounds;
  const dim3 grid{unsigned(blocks * splits)};
  return launch<mamba_step_project_kernel<kBatch>>(grid, dim3(kThreads), 0, stream, s, splits,
                                                   vectorisable(s.x_proj, kLaneChannels, 1));
}

}  // namespace

int mamba_step_project_cuda(const MambaStep& s, void* stream) {
  return s.batch > 4 ? project<8>(s, stream) : project<4>(s, stream);
}

}  // namespace pyseq
