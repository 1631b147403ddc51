// How the gradient is divided up, and what its kernels leave for each other.
//
//   ssd_backward_steps   delta and L of every token and head
//   ssd_backward_states  the state before each chunk, first to last; then G after each chunk, last to first
//   ssd_backward_local   all else but sums, a chunk and some heads of a group to a block
//   ssd_reduce           ddt, and the sums over heads and over tokens
//
// Chunk m of packed sequences: sequence s begins with chunk cu_seqlens[s] / kChunk + s, which leaves room for its tokens
// and those of all before it; a few chunks are empty.
#pragma once
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "ssd/kernel.h"

namespace pyseq::ssd {

// The parts of ssd_backward_cuda, in order; the third is in its own file.
int ssd_backward_steps_cuda(const Ssd&, void* stream);
int ssd_backward_states_cuda(const Ssd&, void* stream);
int ssd_reduce_cuda(const Ssd&, void* stream);

namespace {

constexpr int kChunk = 64, kBlockWidth = 64;   // tokens of a chunk; rows of a state, channels of a head, at a time
constexpr int kStateColumns = 128;             // of a state in registers
constexpr int kThreads = 256, kMostHeads = 16;
constexpr int64_t kLongest = 1 << 30;          // places along an axis and blocks are int, offsets into memory int64_t
enum Step { kDelta, kHigh, kLow, kSteps };     // per token and head: delta, and L in two floats
enum Part { kUx, kGBx, kSCv, kBetween, kParts = kBetween + 4 };   // as in ssd_backward_local

struct Chunk {
  int64_t sequence, row, begin;   // begin: the first token, in row `row` of the batch
  int count;                      // of tokens; 0: an empty one
};

struct Plan {
  int64_t row_chunks, chunks;            // of a sequence that is not packed; of all
  int64_t width_blocks, states;          // of kBlockWidth channels; N of a stored state, a multiple of 8
  int64_t group_heads, heads, head_blocks;   // H / G; of a block; blocks of a group
  bool half;                             // x, B and C are bfloat16, states stored in float16
  bool wide_x, wide_B, wide_C, wide_dy, wide_z, wide_ungated, wide_dx, wide_dz;   // 8 elements at once
  bool wide_dB, wide_dC;                 // 4
  int64_t state_floats;                  // of all stored states
  float less;                            // half: the power of two by which scores, at most 2^30 N, are lessened to fit float16
  float *units;                          // half: [chunks, heads, width_blocks, 2 + 2 column_blocks()], of x, dv, S and G
  float *steps, *parts, *inner, *weights, *slabs;   // weights: dA, dbias; dD of each chunk and warp
  float *skips, *before, *after;         // skips: dD; before, after: S and G
  int64_t floats;

  explicit Plan(const Ssd& s) {
    row_chunks = (s.time + kChunk - 1) / kChunk;
    chunks = s.cu_seqlens ? s.time / kChunk + s.sequences : s.batch * row_chunks;
    width_blocks = (s.width + kBlockWidth - 1) / kBlockWidth;
    states = (s.states + 7) / 8 * 8;
    group_heads = s.groups ? s.heads / s.groups : 0;
    heads = group_heads < kMostHeads ? group_heads : kMostHeads;
    while (heads > 1 && chunks * s.groups * ((group_heads + heads - 1) / heads) < 264) heads = (heads + 1) / 2;
    head_blocks = heads ? (group_heads + heads - 1) / heads : 0;
    half = s.x.type == DType::bf16 && s.B.type == DType::bf16 && s.C.type == DType::bf16;
    wide_x = vectorisable(s.x, 8, 3), wide_dx = vectorisable(s.dx, 8, 3);
    wide_B = vectorisable(s.B, 8, 3), wide_C = vectorisable(s.C, 8, 3);
    wide_dy = vectorisable(s.dy, 8, 3), wide_z = vectorisable(s.z, 8, 3);
    wide_ungated = vectorisable(s.ungated, 8, 3), wide_dz = vectorisable(s.dz, 8, 3);
    state_floats = chunks * s.heads * s.width * states / (half ? 2 : 1);
    wide_dB = vectorisable(s.dB, 4, 3), wide_dC = vectorisable(s.dC, 4, 3);
    less = half ? 0x1p-21f : 1.f;
    for (int64_t n = 128; half && n < states; n *= 2) less /= 2;
    const auto take = [&](float*& to, int64_t count) {
      to = s.workspace + floats;
      floats += (count + 15) / 16 * 16;
    };
    floats = 0;
    take(steps, chunks * s.heads * kSteps * kChunk);
    take(parts, chunks * s.heads * kParts * kChunk);
    take(inner, chunks * s.heads * 4);
    take(units, half ? chunks * s.heads * width_blocks * (2 + 2 * column_blocks()) : 0);
    take(weights, chunks * s.heads * 2);
    take(skips, s.D ? chunks * s.heads * 4 * s.D_width : 0);
    take(slabs, head_blocks * s.batch * s.time * s.groups * 2 * states);
    take(before, state_floats);
    take(after, state_floats);
  }

  constexpr int64_t column_blocks() const { return (states + kStateColumns - 1) / kStateColumns; }
  // Of 64 rows of a head at chunk m: x, dv, then S of each block of columns, then G.
  __device__ float* units_of(const Ssd& s, int64_t m, int64_t head, int64_t row) const {
    return units + ((m * s.heads + head) * width_blocks + row / kBlockWidth) * (2 + 2 * column_blocks());
  }
  __device__ bool invalid(const Ssd& s) const { return s.sequence_of && s.sequence_of[0] < 0; }

  // Where cu_seqlens is not valid: rows of kChunk tokens, of sequence -1, for whom it is to write NaN.
  __device__ Chunk chunk(const Ssd& s, int64_t m) const {
    if (!s.cu_seqlens) return cut(m / row_chunks, m / row_chunks, 0, m % row_chunks, s.time);
    if (invalid(s)) return cut(-1, 0, 0, m, s.time);
    int64_t low = 0, high = s.sequences;   // the last sequence whose first chunk is m or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (s.cu_seqlens[middle] / kChunk + middle <= m ? low : high) = middle;
    }
    const int64_t begin = s.cu_seqlens[low];
    return cut(low, 0, begin, m - (begin / kChunk + low), s.cu_seqlens[low + 1]);
  }
  static __device__ Chunk cut(int64_t sequence, int64_t row, int64_t from, int64_t chunk, int64_t end) {
    const int64_t begin = from + chunk * kChunk, left = end - begin;
    return {sequence, row, begin, int(left < 0 ? 0 : left < kChunk ? left : kChunk)};
  }
  __device__ float* steps_of(const Ssd& s, int64_t m, int64_t head) const {
    return steps + (m * s.heads + head) * kSteps * kChunk;
  }
  __device__ float* parts_of(const Ssd& s, int64_t m, int64_t head) const {
    return parts + (m * s.heads + head) * kParts * kChunk;
  }
  // Row 0 of a head's state at chunk m.
  template <class T> __device__ T* state_of(float* all, const Ssd& s, int64_t m, int64_t head) const {
    return reinterpret_cast<T*>(all) + (m * s.heads + head) * s.width * states;
  }
  // dB and then dC of a token, before they are summed over blocks of heads.
  __device__ float* slab_of(const Ssd& s, int64_t block, int64_t row, int64_t t, int64_t group) const {
    return slabs + (((block * s.batch + row) * s.time + t) * s.groups + group) * 2 * states;
  }
};

// The power of two in units of which numbers up to `most` are at most 2^15, which float16 holds. It is not smaller than
// 2^-54, so that no product of units overflows.
__device__ __forceinline__ float unit_of(float most) {
  const int exponent = max(int(__float_as_uint(most) >> 23), 127 - 40) - 14;
  return most == 0.f ? 1.f : __uint_as_float(unsigned(exponent) << 23);
}
__device__ __forceinline__ float inverse(float unit) { return __uint_as_float((254u << 23) - __float_as_uint(unit)); }

// exp of a difference of two L, which is not positive.
__device__ __forceinline__ float decay(float high, float low) {
  const float d = high + low;
  return ex2(kLog2e * (d > 0.f ? 0.f : d));
}

// A chunk of kColumns numbers to shared memory, times `scale`, as T; zeros from `rows` and `columns` on.
template <int kColumns, class T>
__device__ __forceinline__ void stage(T* tile, int stride, const View& x, int64_t at, int64_t step, int rows, int64_t columns,
                                      bool wide, float scale) {
  constexpr int kEights = kColumns / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk * kEights; i += kThreads) {
    const int row = i / kEights, column = i % kEights * 8;
    Vec<8> v{};
    if (row < rows) v = load_vec<8>(x, at + row * step + column, wide, columns - column);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] *= scale;
    store_vec<8>(tile + row * stride + column, v);
  }
}

// dv = dy silu(z) of 8 channels. Where `store`, dz as well.
template <bool kStore>
__device__ __forceinline__ Vec<8> gated(const Ssd& s, const Plan& p, int64_t row, int64_t t, int64_t head, int64_t channel) {
  const auto at = [&](const View& x) { return row * x.stride[0] + t * x.stride[1] + head * x.stride[2] + channel; };
  const int64_t count = s.width - channel;
  Vec<8> dv{};
  if (s.dy) dv = load_vec<8>(s.dy, at(s.dy), p.wide_dy, count);
  if (!s.z) return dv;
  const Vec<8> z = load_vec<8>(s.z, at(s.z), p.wide_z, count);
  if constexpr (kStore) {
    Vec<8> dz = load_vec<8>(s.ungated, at(s.ungated), p.wide_ungated, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) dz[i] *= dv[i] * silu_grad(z[i]);
    store_vec<8>(s.dz, at(s.dz), dz, p.wide_dz, count);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) dv[i] *= silu(z[i]);
  return dv;
}

}  // namespace

}  // namespace pyseq::ssd
