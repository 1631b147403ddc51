// What the blocks left, put together: every sum in a fixed order.
#include "cuda/reduce.cuh"
#include "ssd/backward.cuh"

namespace pyseq::ssd {
namespace {

constexpr int kHeads = 32;   // of a block of ssd_reduce_steps
__device__ __forceinline__ float nan() { return __int_as_float(0x7fffffff); }

// Sums over the lanes before this one, or behind it.
__device__ __forceinline__ float sum_before(float x, int lane) {
  float sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  const float before = __shfl_up_sync(~0u, sum, 1);
  return lane ? before : 0.f;
}
__device__ __forceinline__ float sum_behind(float x, int lane) {
  float sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_down_sync(~0u, sum, d);
    if (lane + d < 32) sum += other;
  }
  const float behind = __shfl_down_sync(~0u, sum, 1);
  return lane < 31 ? behind : 0.f;
}

struct Tokens { float ddelta[2], da[2], delta[2]; };   // of a lane

// da of a chunk of one head, and ddelta; a lane has tokens 2 lane and 2 lane + 1.
__device__ __forceinline__ Tokens gradients(const float* steps, const float* parts, const float* inner, float A, int lane) {
  Tokens out;
  float after[2], before[2];
  const float last_high = steps[kHigh * kChunk + kChunk - 1], last_low = steps[kLow * kChunk + kChunk - 1];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    const float high = steps[kHigh * kChunk + t], low = steps[kLow * kChunk + t];
    out.delta[i] = steps[kDelta * kChunk + t];
    after[i] = decay(high, low) * parts[kSCv * kChunk + t];
    before[i] = decay(last_high - high, last_low - low) * out.delta[i] * parts[kGBx * kChunk + t];
  }
  const float passes = decay(last_high, last_low) * ((inner[0] + inner[1]) + (inner[2] + inner[3]));
  const float behind = sum_behind(after[0] + after[1], lane) + after[1], ahead = sum_before(before[0] + before[1], lane);
  out.da[0] = behind + after[0] + passes + ahead;
  out.da[1] = behind + passes + (ahead + before[0]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.da[i] += parts[(kBetween + k) * kChunk + t];
    out.ddelta[i] = fmaf(A, out.da[i], parts[kUx * kChunk + t]);
  }
  return out;
}

__global__ void __launch_bounds__(kThreads) ssd_reduce_steps_kernel(Ssd s, Plan p) {
  const int64_t blocks = (s.heads + kHeads - 1) / kHeads, m = blockIdx.x / blocks, head = blockIdx.x % blocks * kHeads;
  const Chunk chunk = p.chunk(s, m);
  __shared__ float slope[kChunk][kHeads + 1];   // the derivative of delta, then ddt
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t mine = head + lane;
  const bool there = mine < s.heads, valid = chunk.sequence >= 0;
  const float bias = s.dt_bias && there ? s.dt_bias[mine] : 0.f;
  for (int t = warp; t < chunk.count && there; t += kThreads / 32) {
    const float v = load(s.dt, chunk.row * s.dt.stride[0] + (chunk.begin + t) * s.dt.stride[1] + mine) + bias;
    const float d = s.dt_softplus ? softplus(v) : v, grad = s.dt_softplus && v <= 20.f ? sigmoid(v) : 1.f;
    slope[t][lane] = d < s.dt_low || d > s.dt_high ? 0.f : grad;
  }
  __syncthreads();
  for (int i = warp; i < kHeads && head + i < s.heads; i += kThreads / 32) {
    const int64_t h = head + i, at = m * s.heads + h;
    const float A = s.A[h];
    float dA = 0.f, dbias = 0.f;
    if (chunk.count && valid) {
      const Tokens g = gradients(p.steps_of(s, m, h), p.parts_of(s, m, h), p.inner + 4 * at, A, lane);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int t = 2 * lane + k;
        if (t >= chunk.count) continue;
        const float ddt = A <= 0.f ? slope[t][i] == 0.f ? 0.f : g.ddelta[k] * slope[t][i] : nan();
        slope[t][i] = ddt;
        dA = fmaf(g.delta[k], g.da[k], dA);
        dbias += ddt;
      }
    }
    dA = warp_sum(dA), dbias = warp_sum(dbias);
    if (lane == 0) p.weights[2 * at] = dA, p.weights[2 * at + 1] = dbias;
  }
  __syncthreads();
  for (int t = warp; t < chunk.count && there; t += kThreads / 32) {
    const int64_t to = chunk.row * s.ddt.stride[0] + (chunk.begin + t) * s.ddt.stride[1] + mine;
    store(s.ddt, to, valid ? slope[t][lane] : nan());
  }
}

// Four states of dB or dC of one token and group per thread, in the order in which the slabs lie.
__global__ void __launch_bounds__(kThreads) ssd_reduce_tokens_kernel(Ssd s, Plan p) {
  const int64_t quads = p.states / 4, slab = s.batch * s.time * s.groups * 2 * p.states;
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t at = 4 * i;
  if (at >= slab) return;
  const int64_t n = i % quads * 4, kind = i / quads % 2;
  i /= 2 * quads;
  const int64_t group = i % s.groups, t = i / s.groups % s.time, row = i / s.groups / s.time;
  Vec<4> sum{};
  for (int64_t block = 0; block < p.head_blocks; ++block) {
    const Vec<4> x = load_vec<4>(p.slabs + block * slab + at);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += x[k];
  }
  if (p.invalid(s)) sum = {{nan(), nan(), nan(), nan()}};
  const View& to = kind ? s.dC : s.dB;
  const int64_t offset = row * to.stride[0] + t * to.stride[1] + group * to.stride[2] + n;
  store_vec<4>(to, offset, sum, kind ? p.wide_dC : p.wide_dB, s.states - n);
}

// A block sums one head's dA, dbias, and dD.
__global__ void __launch_bounds__(kThreads) ssd_reduce_heads_kernel(Ssd s, Plan p) {
  const int64_t h = blockIdx.x;
  const bool wrong = p.invalid(s) || !(s.A[h] <= 0.f);
  const auto sum = [&](float* to, const float* from, int64_t count, int64_t stride) {
    float x = 0.f;
    if (!p.invalid(s)) {
      for (int64_t i = threadIdx.x; i < count; i += kThreads) x += from[i * stride];
    }
    x = block_sum<kThreads>(x);
    if (threadIdx.x == 0) *to = wrong ? nan() : x;
  };
  sum(s.dA + h, p.weights + 2 * h, p.chunks, 2 * s.heads);
  if (s.dbias) sum(s.dbias + h, p.weights + 2 * h + 1, p.chunks, 2 * s.heads);
  if (!s.dD) return;
  const int64_t channels = s.heads * s.D_width;
  for (int64_t k = h * s.D_width; k < (h + 1) * s.D_width; ++k) sum(s.dD + k, p.skips + k, 4 * p.chunks, channels);
}

}  // namespace

int ssd_reduce_cuda(const Ssd& s, void* stream) {
  const Plan p(s);
  const dim3 threads(kThreads);
  if (p.chunks > 0) {
    const dim3 grid(unsigned(p.chunks * ((s.heads + kHeads - 1) / kHeads)));
    if (int error = launch<ssd_reduce_steps_kernel>(grid, threads, 0, stream, s, p)) return error;
  }
  const int64_t quads = s.batch * s.time * s.groups * 2 * p.states / 4;
  if (quads > 0) {
    const dim3 grid(unsigned((quads + kThreads - 1) / kThreads));
    if (int error = launch<ssd_reduce_tokens_kernel>(grid, threads, 0, stream, s, p)) return error;
  }
  return launch<ssd_reduce_heads_kernel>(dim3(unsigned(s.heads)), threads, 0, stream, s, p);
}

}  // namespace pyseq::ssd
