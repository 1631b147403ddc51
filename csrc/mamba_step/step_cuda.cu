// All of the step behind W_x u, in one launch of as many blocks as are resident. A block goes over tiles of 64
// channels, for four rows, which read W_dt once; four lanes share a channel. The state is asked for first, 16 bytes a
// lane (8 of bfloat16), and arrives while the block adds up the parts of W_x u, once, and multiplies by W_dt.
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
  int rank, states;
  __host__ __device__ explicit Shared(const MambaStep& s)
      : rank(int((s.rank + kRankPass - 1) / kRankPass * kRankPass)),
        states(int((s.states + kPass - 1) / kPass * kPass)) {}
  __host__ __device__ int row() const { return rank + 2 * states; }
};

// Adds up the chunks of W_x u, in order, into kRows rows of shared memory.
__device__ __forceinline__ void gather(const MambaStep& s, const Shared& layout, float* shared, int64_t first) {
  const int pitch = layout.row(), rank = int(s.rank), states = int(s.states), outputs = int(s.outputs());
  const int B = layout.rank, C = B + layout.states, chunks = int(mamba_chunks(s.dim));
  for (int i = threadIdx.x; i < kRows * pitch; i += kThreads) {
    const int b = i / pitch, at = i % pitch;
    const int in_part = at < B ? at : at < C ? at - B : at - C;
    const int output = at < B ? at : at < C ? rank + in_part : rank + states + in_part;
    float total = 0.f;
    if (in_part < (at < B ? rank : states) && first + b < s.batch) {
      const float* p = s.projected + (first + b) * outputs + output;
      for (int k = 0; k < chunks; ++k, p += s.batch * outputs) total += *p;
    }
    shared[i] = total;
  }
}

// Divides each part of each row by its root mean square: a warp a part.
__device__ __forceinline__ void normalise(const MambaStep& s, const Shared& layout, float* shared) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 3 * kRows; i += kThreads / 32) {
    const int part = i % 3, size = int(part == 0 ? s.rank : s.states);
    float* const v = shared + i / 3 * layout.row() + (part == 0 ? 0 : layout.rank + (part - 1) * layout.states);
    float squares = 0.f;
    for (int k = lane; k < size; k += 32) squares = fmaf(v[k], v[k], squares);
    const float scale = rsqrtf(warp_sum(squares) / float(size) + s.eps);
    for (int k = lane; k < size; k += 32) v[k] *= scale;
  }
}

// The part of W_dt low that this lane's r give, for each row.
template <class T>
__device__ __forceinline__ void low_rank(const MambaStep& s, const float* low, int pitch, int64_t channel,
                                         bool vectorised, float (&dt)[kRows]) {
  const int rank = int(s.rank);
  const T* const weight = static_cast<const T*>(s.dt_proj.data) + channel * s.dt_proj.stride[0];
#pragma unroll 2
  for (int r = threadIdx.x % kLanes * kLaneRank; r < rank; r += kRankPass) {
    Vec<kLaneRank> w;
    if (vectorised && r + kLaneRank <= rank) {
      w = load_vec<kLaneRank>(weight + r);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneRank; ++i) w[i] = r + i < rank ? load(weight + r + i) : 0.f;
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
__device__ __forceinline__ Vec<kLaneStates> load_states(const T* p, int n, int states, bool vectorised) {
  if (vectorised && n + kLaneStates <= states) return load_vec<kLaneStates>(p + n);
  Vec<kLaneStates> h;
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i) h[i] = n + i < states ? load(p + n + i) : 0.f;
  return h;
}

template <class T>
__device__ __forceinline__ void store_states(T* p, int n, int states, bool vectorised,
                                             const Vec<kLaneStates>& h) {
  if (vectorised && n + kLaneStates <= states) return store_vec<kLaneStates>(p + n, h);
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    if (n + i < states) store(p + n + i, h[i]);
}

struct Aligned { bool state, A, dt_proj; };

template <class T>
__global__ void __launch_bounds__(kThreads, 2) mamba_step_kernel(MambaStep s, int64_t splits, Aligned aligned) {
  const int64_t tiles = (s.dim + kChannels - 1) / kChannels, first = blockIdx.x / splits * kRows;
  const int lane = threadIdx.x % kLanes, states = int(s.states);
  const Shared layout(s);
  float* const shared = dynamic_smem<float>();
  for (int64_t tile = blockIdx.x % splits; tile < tiles; tile += splits) {
    const int64_t channel = tile * kChannels + threadIdx.x / kLanes;
    const bool exists = channel < s.dim;
    T* const state = static_cast<T*>(s.state.data) + channel * s.state.stride[1];
    const auto has = [&](int64_t b) { return exists && first + b < s.batch; };
    Vec<kLaneStates> h[kRows];
    const auto load_rows = [&](int n) {
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const int there = has(b) ? states : 0;
        h[b] = load_states(state + (there ? (first + b) * s.state.stride[0] : 0), n, there, aligned.state);
      }
    };
    load_rows(lane * kLaneStates);
    if (tile < splits) {   // the block's first
      gather(s, layout, shared, first);
      __syncthreads();
      if (s.normed) {
        normalise(s, layout, shared);
        __syncthreads();
      }
    }

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
      const Channel c(s, channel);
      float u = 0.f;
      with_types(s, [&]<class X, class S>() { u = convolve<true, X, S>(s, c, own, channel); });
      delta = softplus(dt[0] + load(s.dt_bias, channel));
      du = delta * u;
      skip = load(s.skip, channel) * u;
    }

    float y[kRows] = {};
    for (int pass = 0; pass < states; pass += kPass) {
      const int n = pass + lane * kLaneStates, left = exists ? states - n : 0;
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
        if (has(b)) store_states(state + (first + b) * s.state.stride[0], n, states, aligned.state, h[b]);
      }
    }
    share_sums<kLanes>(y);
    if (has(lane)) {
      const float gate = silu(load(s.z, own * s.z.stride[0] + channel));
      store(s.y, own * s.y.stride[0] + channel, (y[0] + skip) * gate);
    }
  }
}

template <class T> int update(const MambaStep& s, void* stream) {
  constexpr int64_t kResident = 2 * 132;   // blocks of an H200
  const int64_t tiles = (s.dim + kChannels - 1) / kChannels, groups = (s.batch + kRows - 1) / kRows;
  const int64_t fit = groups < kResident ? kResident / groups : 1;
  const int64_t splits = fit < tiles ? fit : tiles;
  const Aligned aligned{vectorisable(s.state, kLaneStates, 2), vectorisable(s.A, kLaneStates, 1),
                        vectorisable(s.dt_proj, kLaneRank, 1)};
  const size_t bytes = kRows * Shared(s).row() * sizeof(float);
  const dim3 grid(unsigned(groups * splits));
  return launch<mamba_step_kernel<T>>(grid, dim3(kThreads), bytes, stream, s, splits, aligned);
}

}  // namespace

int mamba_step_cuda(const MambaStep& s, void* stream) {
  return s.state.type == DType::f32 ? update<float>(s, stream) : update<__nv_bfloat16>(s, stream);
}

}  // namespace pyseq
