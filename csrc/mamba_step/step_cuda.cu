// All of the step behind W_x u, in one launch. A block is 64 channels of four rows, which read W_dt once; four lanes
// share a channel. The state is asked for first, 16 bytes a lane (8 of bfloat16), and arrives while the block adds up
// the parts of W_x u and multiplies by W_dt.
//
// Each of the four lanes owns one of the four rows: it computes the row's step, convolution, skip and gate, and hands
// delta and delta u to the other three. Of the states it advances four out of every sixteen, in every row. (Eight rows
// would read W_dt half as often, but their states do not fit into 128 registers.)
#include "cuda/reduce.cuh"
#include "mamba_step/update.cuh"

namespace pyseq {
namespace {

constexpr int kThreads = 256, kLanes = 4, kRows = kLanes, kChannels = kThreads / kLanes;
constexpr int kLaneStates = 4, kPass = kLanes * kLaneStates;
constexpr int kLaneRank = 8, kRankPass = kLanes * kLaneRank;
static_assert(kRows * (kMambaWidest + kRankPass - 1 + 2 * (kPass - 1)) * sizeof(float) <= 96 * 1024);

// The rows [low, B, C] in shared memory, each padded with zeros to whole passes.
struct Shared {
  int64_t rank, states;
  __host__ __device__ explicit Shared(const MambaStep& s)
      : rank((s.rank + kRankPass - 1) / kRankPass * kRankPass), states((s.states + kPass - 1) / kPass * kPass) {}
  __host__ __device__ int64_t row() const { return rank + 2 * states; }
};

// One part of a row: adds up the chunks in order, then divides by the root mean square if asked. By one warp.
__device__ __forceinline__ void gather(const MambaStep& s, float* to, int64_t padded, int64_t row, int64_t from,
                                       int64_t size) {
  const int lane = threadIdx.x % 32;
  const int64_t outputs = s.outputs(), chunks = mamba_chunks(s.dim);
  float squares = 0.f;
  for (int64_t i = lane; i < padded; i += 32) {
    float total = 0.f;
    if (i < size && row < s.batch) {
      for (int64_t k = 0; k < chunks; ++k) total += s.projected[(k * s.batch + row) * outputs + from + i];
    }
    to[i] = total;
    squares = fmaf(total, total, squares);
  }
  if (!s.normed) return;
  const float scale = rsqrtf(warp_sum(squares) / float(size) + s.eps);
  for (int64_t i = lane; i < size && row < s.batch; i += 32) to[i] *= scale;   // what this lane wrote
}

// The part of W_dt low that this lane's r give, for each row.
template <class T>
__device__ __forceinline__ void low_rank(const MambaStep& s, const float* low, int64_t pitch, int64_t channel,
                                         bool vectorised, float (&dt)[kRows]) {
  const T* const weight = static_cast<const T*>(s.dt_proj.data) + channel * s.dt_proj.stride[0];
#pragma unroll 2
  for (int64_t r = threadIdx.x % kLanes * kLaneRank; r < s.rank; r += kRankPass) {
    Vec<kLaneRank> w;
    if (vectorised && r + kLaneRank <= s.rank) {
      w = load_vec<kLaneRank>(weight + r);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneRank; ++i) w[i] = r + i < s.rank ? load(weight + r + i) : 0.f;
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const Vec<kLaneRank> l = load_vec<kLaneRank>(low + b * pitch + r);
#pragma unroll
      for (int i = 0; i < kLaneRank; ++i) dt[b] = fmaf(w[i], l[i], dt[b]);
    }
  }
}

template <class T>
__device__ __forceinline__ Vec<kLaneStates> load_states(const T* p, int64_t n, int64_t states, bool vectorised) {
  if (vectorised && n + kLaneStates <= states) return load_vec<kLaneStates>(p + n);
  Vec<kLaneStates> h;
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i) h[i] = n + i < states ? load(p + n + i) : 0.f;
  return h;
}

template <class T>
__device__ __forceinline__ void store_states(T* p, int64_t n, int64_t states, bool vectorised,
                                             const Vec<kLaneStates>& h) {
  if (vectorised && n + kLaneStates <= states) return store_vec<kLaneStates>(p + n, h);
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    if (n + i < states) store(p + n + i, h[i]);
}

struct Aligned { bool state, A, dt_proj; };

template <class T> __global__ void __launch_bounds__(kThreads, 2) mamba_step_kernel(MambaStep s, Aligned aligned) {
  const int64_t tiles = (s.dim + kChannels - 1) / kChannels, first = blockIdx.x / tiles * kRows;
  const int64_t channel = blockIdx.x % tiles * kChannels + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool exists = channel < s.dim;
  T* const state = static_cast<T*>(s.state.data) + channel * s.state.stride[1];
  const auto has = [&](int64_t b) { return exists && first + b < s.batch; };
  Vec<kLaneStates> h[kRows];
  const auto load_rows = [&](int64_t n) {
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const int64_t there = has(b) ? s.states : 0;
      h[b] = load_states(state + (there ? (first + b) * s.state.stride[0] : 0), n, there, aligned.state);
    }
  };
  load_rows(lane * kLaneStates);

  const Shared layout(s);
  float* const shared = dynamic_smem<float>();
  for (int i = threadIdx.x / 32; i < 3 * kRows; i += kThreads / 32) {   // by warp: a part of a row each
    const int64_t row = first + i / 3;
    float* const low = shared + i / 3 * layout.row();
    switch (i % 3) {
      case 0: gather(s, low, layout.rank, row, 0, s.rank); break;
      case 1: gather(s, low + layout.rank, layout.states, row, s.rank, s.states); break;
      default: gather(s, low + layout.rank + layout.states, layout.states, row, s.rank + s.states, s.states);
    }
  }
  __syncthreads();

  float dt[kRows] = {};
  if (exists) {
    switch (s.dt_proj.type) {
      case DType::bf16: low_rank<__nv_bfloat16>(s, shared, layout.row(), channel, aligned.dt_proj, dt); break;
      case DType::f16: low_rank<__half>(s, shared, layout.row(), channel, aligned.dt_proj, dt); break;
      default: low_rank<float>(s, shared, layout.row(), channel, aligned.dt_proj, dt);
    }
  }
  share_sums<kLanes>(dt);
  const int64_t own = first + lane;
  float delta = 0.f, du = 0.f, skip = 0.f;
  if (has(lane)) {
    const float u = convolve<true>(s, Channel(s, channel, true), own, channel);
    delta = softplus(dt[0] + load(s.dt_bias, channel));
    du = delta * u;
    skip = load(s.skip, channel) * u;
  }

  float y[kRows] = {};
  for (int64_t n = lane * kLaneStates, pass = 0; pass < s.states; n += kPass, pass += kPass) {
    const int64_t left = exists ? s.states - n : 0;
    Vec<kLaneStates> A = load_vec<kLaneStates>(s.A, left > 0 ? channel * s.A.stride[0] + n : 0, aligned.A, left);
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) A[i] *= kLog2e;
    if (pass > 0) load_rows(n);
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const float delta_b = __shfl_sync(~0u, delta, b, kLanes);
      const float du_b = __shfl_sync(~0u, du, b, kLanes);
      const float* const row = shared + b * layout.row() + layout.rank;
      const Vec<kLaneStates> B = load_vec<kLaneStates>(row + n), C = load_vec<kLaneStates>(row + layout.states + n);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        h[b][i] = fmaf(ex2(delta_b * A[i]), h[b][i], du_b * B[i]);
        y[b] = fmaf(h[b][i], C[i], y[b]);
      }
      if (has(b)) store_states(state + (first + b) * s.state.stride[0], n, s.states, aligned.state, h[b]);
    }
  }
  share_sums<kLanes>(y);
  if (has(lane)) {
    const float gate = silu(load(s.z, own * s.z.stride[0] + channel));
    store(s.y, own * s.y.stride[0] + channel, (y[0] + skip) * gate);
  }
}

template <class T> int update(const MambaStep& s, void* stream) {
  const int64_t tiles = (s.dim + kChannels - 1) / kChannels, groups = (s.batch + kRows - 1) / kRows;
  const size_t bytes = kRows * Shared(s).row() * sizeof(float);
  const Aligned aligned{vectorisable(s.state, kLaneStates, 2), vectorisable(s.A, kLaneStates, 1),
                        vectorisable(s.dt_proj, kLaneRank, 1)};
  return launch<mamba_step_kernel<T>>(dim3(unsigned(tiles * groups)), dim3(kThreads), bytes, stream, s, aligned);
}

}  // namespace

int mamba_step_cuda(const MambaStep& s, void* stream) {
  return s.state.type == DType::f32 ? update<float>(s, stream) : update<__nv_bfloat16>(s, stream);
}

}  // namespace pyseq
