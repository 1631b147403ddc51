// delta and its product with A, summed from the beginning of each chunk: L, in two floats.
#include "ssd/backward.cuh"

namespace pyseq::ssd {
namespace {

constexpr int kHeads = 32;   // of a block

// A number and what its rounding left.
struct Double { float high, low; };

__device__ __forceinline__ Double operator+(const Double& a, const Double& b) {
  const float sum = a.high + b.high, back = sum - a.high;
  const float lost = (a.high - (sum - back)) + (b.high - back) + (a.low + b.low);
  const float high = sum + lost;
  return {high, lost - (high - sum)};
}

// A warp takes heads in turn, a lane two tokens.
__device__ __forceinline__ void sum_head(float* to, const float* delta, float A, int lane) {
  Double step[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float a = __fmul_rn(delta[(2 * lane + i) * (kHeads + 1)], A);   // never part of the sum
    step[i] = {A <= 0.f ? a < kLeast ? kLeast : a : __int_as_float(0x7fffffff), 0.f};
  }
  Double sum = step[0] + step[1];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Double before = {__shfl_up_sync(~0u, sum.high, d), __shfl_up_sync(~0u, sum.low, d)};
    if (lane >= d) sum = before + sum;
  }
  const Double before = {__shfl_up_sync(~0u, sum.high, 1), __shfl_up_sync(~0u, sum.low, 1)};
  const Double first = lane ? before + step[0] : step[0];
  float2* const pairs = reinterpret_cast<float2*>(to) + lane;
  pairs[kDelta * kChunk / 2] = {delta[2 * lane * (kHeads + 1)], delta[(2 * lane + 1) * (kHeads + 1)]};
  pairs[kHigh * kChunk / 2] = {first.high, sum.high};
  pairs[kLow * kChunk / 2] = {first.low, sum.low};
}

__global__ void __launch_bounds__(kThreads) ssd_backward_steps_kernel(Ssd s, Plan p) {
  const int64_t blocks = (s.heads + kHeads - 1) / kHeads, m = blockIdx.x / blocks, head = blockIdx.x % blocks * kHeads;
  const Chunk chunk = p.chunk(s, m);
  if (chunk.sequence < 0) return;
  __shared__ float delta[kChunk][kHeads + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t mine = head + lane;
  const float bias = s.dt_bias && mine < s.heads ? s.dt_bias[mine] : 0.f;
  for (int t = warp; t < kChunk; t += kThreads / 32) {
    float d = 0.f;
    if (t < chunk.count && mine < s.heads) {
      d = load(s.dt, chunk.row * s.dt.stride[0] + (chunk.begin + t) * s.dt.stride[1] + mine) + bias;
      if (s.dt_softplus) d = softplus(d);
      d = d < s.dt_low ? s.dt_low : d;
      d = d > s.dt_high ? s.dt_high : d;
    }
    delta[t][lane] = d;
  }
  __syncthreads();
  for (int i = warp; i < kHeads && head + i < s.heads; i += kThreads / 32) {
    sum_head(p.steps_of(s, m, head + i), &delta[0][i], s.A[head + i], lane);
  }
}

}  // namespace

int ssd_backward_steps_cuda(const Ssd& s, void* stream) {
  const Plan p(s);
  const dim3 grid(unsigned(p.chunks * ((s.heads + kHeads - 1) / kHeads)));
  return launch<ssd_backward_steps_kernel>(grid, dim3(kThreads), 0, stream, s, p);
}

}  // namespace pyseq::ssd
