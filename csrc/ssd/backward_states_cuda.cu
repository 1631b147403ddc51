// The state before each chunk, from the first on, and G after each chunk, from the last back: the same walk
//
//   S' = exp(L[Q]) S + sum_j exp(L[Q] - L[j]) delta[j] x[j] B[j]^T        G before = exp(L[Q]) G + sum_i exp(L[i]) dv[i] C[i]^T
//
// A block has 64 rows and 128 columns of one state in registers, a warp 16 by 64 of them. The scaled x or dv goes in two parts
// into products of bfloat16, so that the state stays what float32 makes it; only what is stored to be an operand is rounded, to
// float16 in units that are stored as well, with those of x and dv.
#include "cuda/async.cuh"
#include "ssd/backward.cuh"
#include "cuda/operands.cuh"

namespace pyseq::ssd {
namespace {

constexpr int kRowStride = kBlockWidth + 8, kColumnStride = kStateColumns + 8;   // padded against bank conflicts
constexpr int kWarps = kThreads / 32;

template <class Policy> struct Memory {
  using T = typename Policy::Exact::T;
  static constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
  T columns[kChunk][kColumnStride];       // B or C
  T scaled[kParts][kChunk][kRowStride];   // x or dv, times its weight; what rounding left of it
  float most_input[kWarps], most_state[kWarps];   // the largest numbers of each warp
};

// The block's place: 64 rows and 128 columns of a head's state.
struct Place {
  int64_t head, row, column;
  int lane, warp;
  __device__ __forceinline__ int64_t row_of(int r) const { return row + warp % 4 * 16 + lane / 4 + r / 2 * 8; }
  __device__ __forceinline__ int64_t column_of(int n, int half) const {
    return column + warp / 4 * 64 + n * 16 + half * 8 + lane % 4 * 2;
  }
};

__device__ __forceinline__ float largest(const float (&x)[kWarps]) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) most = fmaxf(most, x[i]);
  return most;
}
__device__ __forceinline__ void keep_largest(float* to, float x, const Place& at) {
  for (int d = 1; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  if (at.lane == 0) to[at.warp] = x;
}

struct Walk {
  int64_t sequence, row, begin, end, first, chunks;   // tokens [begin, end) of the row; chunks from `first` on
  __device__ Walk(const Ssd& s, const Plan& p, int64_t sequence) : sequence(sequence) {
    const bool packed = s.cu_seqlens;
    row = packed ? 0 : sequence;
    begin = packed ? s.cu_seqlens[sequence] : 0;
    end = packed ? s.cu_seqlens[sequence + 1] : s.time;
    first = packed ? begin / kChunk + sequence : sequence * p.row_chunks;
    chunks = (end - begin + kChunk - 1) / kChunk;
  }
};

template <class Policy, bool kReverse>
__device__ __forceinline__ void stage_chunk(Memory<Policy>& m, const Ssd& s, const Plan& p, const Place& at, const Chunk& chunk,
                                            const float* steps) {
  using T = typename Memory<Policy>::T;
  const View& B = kReverse ? s.C : s.B;
  const int64_t group = at.head / p.group_heads;
  const int64_t from = chunk.row * B.stride[0] + chunk.begin * B.stride[1] + group * B.stride[2] + at.column;
  const int columns = int(s.states - at.column);
  if (Policy::kScaled && (kReverse ? p.wide_C : p.wide_B)) {   // both are bfloat16
    const T* const rows = static_cast<const T*>(B.data) + from;
#pragma unroll 2
    for (int i = threadIdx.x; i < kChunk * kStateColumns / 8; i += kThreads) {
      const int t = i / (kStateColumns / 8), column = i % (kStateColumns / 8) * 8;
      const int used = t < chunk.count ? min(max(columns - column, 0), 8) : 0;
      cp_async<16>(&m.columns[t][column], used ? rows + t * B.stride[1] + column : rows, 2 * used);
    }
  } else {
    stage<kStateColumns>(&m.columns[0][0], kColumnStride, B, from, B.stride[1], chunk.count, columns,
                         kReverse ? p.wide_C : p.wide_B, 1.f);
  }
  constexpr int kEights = kBlockWidth / 8;
  float most = 0.f;
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk * kEights; i += kThreads) {
    const int t = i / kEights, column = i % kEights * 8;
    const float high = steps[kHigh * kChunk + t], low = steps[kLow * kChunk + t];
    const float last_high = steps[kHigh * kChunk + kChunk - 1], last_low = steps[kLow * kChunk + kChunk - 1];
    const float weight = kReverse ? decay(high, low) : decay(last_high - high, last_low - low) * steps[kDelta * kChunk + t];
    Vec<8> v{};
    if (t < chunk.count) {
      if constexpr (kReverse) {
        v = gated<false>(s, p, chunk.row, chunk.begin + t, at.head, at.row + column);
      } else {
        const int64_t x = chunk.row * s.x.stride[0] + (chunk.begin + t) * s.x.stride[1] + at.head * s.x.stride[2];
        v = load_vec<8>(s.x, x + at.row + column, p.wide_x, s.width - at.row - column);
      }
    }
    Vec<8> rest;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      most = fmaxf(most, fabsf(v[k]));
      v[k] *= weight;
      T rounded;
      store(&rounded, v[k]);
      rest[k] = v[k] - load(&rounded);
    }
    store_vec<8>(&m.scaled[0][t][column], v);
    if constexpr (sizeof(T) == 2) store_vec<8>(&m.scaled[1][t][column], rest);
  }
  if constexpr (Policy::kScaled) keep_largest(m.most_input, most, at);
}

template <class Policy, bool kReverse>
__global__ void __launch_bounds__(kThreads, Policy::kScaled ? 2 : 1) ssd_backward_states_kernel(Ssd s, Plan p) {
  using T = typename Policy::T;
  using Exact = typename Policy::Exact;
  Memory<Policy>& m = *dynamic_smem<Memory<Policy>>();
  int64_t block = blockIdx.x;
  const int64_t column_block = block % p.column_blocks();
  Place at{0, 0, column_block * kStateColumns, int(threadIdx.x % 32), int(threadIdx.x / 32)};
  block /= p.column_blocks();
  at.row = block % p.width_blocks * kBlockWidth;
  block /= p.width_blocks;
  at.head = block % s.heads;
  const int64_t sequence = block / s.heads, state = (sequence * s.heads + at.head) * s.width * s.states;
  Result acc[4];
  // Calls f(element, row, column) for what this thread has of the state.
  const auto each = [&](auto f) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 8; ++i) f(acc[n][i / 4][i % 4], at.row_of(i % 4), at.column_of(n, i / 4) + i % 2);
  };
  const float* const initial = kReverse ? s.dstate_out : s.state;
  each([&](float& x, int64_t row, int64_t n) {
    x = initial && row < s.width && n < s.states ? initial[state + row * s.states + n] : 0.f;
  });
  const auto keep_state = [&] {
    float most = 0.f;
    each([&](float& x, int64_t, int64_t) { most = fmaxf(most, fabsf(x)); });
    keep_largest(m.most_state, most, at);
  };
  const bool invalid = p.invalid(s);
  if (!invalid) {
    if constexpr (Policy::kScaled) keep_state();
    const Walk walk(s, p, sequence);
#pragma unroll 1
    for (int64_t i = 0; i < walk.chunks; ++i) {
      const int64_t c = kReverse ? walk.chunks - 1 - i : i;
      const Chunk chunk = Plan::cut(sequence, walk.row, walk.begin, c, walk.end);
      const float* const steps = p.steps_of(s, walk.first + c, at.head);
      T* const to = p.state_of<T>(kReverse ? p.after : p.before, s, walk.first + c, at.head);
      stage_chunk<Policy, kReverse>(m, s, p, at, chunk, steps);
      cp_async_wait_all();
      __syncthreads();
      float scale = 1.f;
      if constexpr (Policy::kScaled) {
        const float unit = unit_of(largest(m.most_state));
        float* const units = p.units_of(s, walk.first + c, at.head, at.row);
        if (threadIdx.x == 0) units[2 + kReverse * p.column_blocks() + column_block] = unit;
        if (threadIdx.x == 0 && column_block == 0) units[kReverse] = unit_of(largest(m.most_input));
        scale = inverse(unit);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          const int64_t row = at.row_of(r), column = at.column_of(n / 2, n % 2);
          const float* const x = acc[n / 2][n % 2];
          if (row < s.width && column < p.states) {
            Policy::store_pair(to + row * p.states + column, scale * x[r], scale * x[r + 1]);
          }
        }
      const float passes = decay(steps[kHigh * kChunk + kChunk - 1], steps[kLow * kChunk + kChunk - 1]);
#pragma unroll 1
      for (int k = 0; k < kChunk; k += 16) {
        using Tile = Matrix<const typename Exact::T>;
        const auto rows = [&](int part) {
          return Exact::template load_a<true>(Tile{&m.scaled[part][k][at.warp % 4 * 16], kRowStride}, at.lane);
        };
        typename Exact::Computed a;
        if constexpr (Policy::kScaled) a = {rows(0), rows(1)};
        else a = rows(0);
        const float kept = k == 0 ? passes : 1.f;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const Tile columns{&m.columns[k][at.warp / 4 * 64 + n * 16], kColumnStride};
          Result more = {};   // tensor cores cut off what they add to a sum: long sums would err to one side
          Exact::multiply(more, a, Exact::template load_b<false>(columns, at.lane));
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[n][i / 4][i % 4] = fmaf(kept, acc[n][i / 4][i % 4], more[i / 4][i % 4]);
        }
      }
      __syncthreads();
      if constexpr (Policy::kScaled) keep_state();
    }
  }
  if (!kReverse || !s.dstate) return;
  each([&](float& x, int64_t row, int64_t n) {
    if (row < s.width && n < s.states) s.dstate[state + row * s.states + n] = invalid ? __int_as_float(0x7fffffff) : x;
  });
}

template <class Policy> int launch_both(const Ssd& s, const Plan& p, void* stream) {
  const dim3 grid(unsigned(s.sequences * s.heads * p.width_blocks * p.column_blocks()));
  const dim3 threads(kThreads);
  constexpr size_t kBytes = sizeof(Memory<Policy>);
  if (int error = launch<ssd_backward_states_kernel<Policy, false>>(grid, threads, kBytes, stream, s, p)) return error;
  return launch<ssd_backward_states_kernel<Policy, true>>(grid, threads, kBytes, stream, s, p);
}

}  // namespace

int ssd_backward_states_cuda(const Ssd& s, void* stream) {
  const Plan p(s);
  return p.half ? launch_both<Half>(s, p, stream) : launch_both<Full>(s, p, stream);
}

}  // namespace pyseq::ssd
