// What a block of the fused form has of a chunk: C, two stages of B and the scores for all of its warps; two stages of
// x and the steps for each.
#pragma once
#include "cuda/opaque.cuh"
#include "ssd/chunk.cuh"

namespace pyseq {
namespace {

// What a warp works on: kept in shared memory, since the state takes up its registers.
struct alignas(16) Tile {
  int sequence, segment, end;          // where the segment ends
  int row, head, group, first, rows;   // the row of the batch; the first row of the state, and how many there are
  float A, sum, D[kRows];              // sum: L[Q] of the chunks of the segment
};

template <int N> struct Place {   // bytes
  static constexpr int kC = 0, kB = Rows<N>::kBytes, kScoresAt = kB + 2 * Rows<N>::kBytes,
                       kOwn = kScoresAt + kScores * 256 * 4;
  // Of a warp, from kOwn on.
  static constexpr int kSteps = 2 * Rows<kRows>::kBytes, kTile = kSteps + int(sizeof(Steps)),
                       kEach = kTile + int(sizeof(Tile));
  static constexpr int bytes(int warps) { return kOwn + warps * kEach; }
};

template <int N> struct Chunk {
  const Ssd& s;
  unsigned char *memory, *own;
  int lane, g, t;   // lane = 4 g + t, as in mma

  __device__ __forceinline__ Rows<N> C() const { return {memory + Place<N>::kC}; }
  __device__ __forceinline__ Rows<N> B(int stage) const { return {memory + Place<N>::kB + stage * Rows<N>::kBytes}; }
  __device__ __forceinline__ Rows<kRows> x(int stage) const { return {own + stage * Rows<kRows>::kBytes}; }
  __device__ __forceinline__ Steps& steps() const { return *reinterpret_cast<Steps*>(own + Place<N>::kSteps); }
  __device__ __forceinline__ float* score(int block, int half) const {
    return reinterpret_cast<float*>(memory + Place<N>::kScoresAt) + ((block * 2 + half) * 32 + lane) * 4;
  }
  __device__ __forceinline__ Tile& at() const { return *reinterpret_cast<Tile*>(own + Place<N>::kTile); }
  // Where token `begin` begins.
  __device__ __forceinline__ int64_t of_head(const View& x, int begin) const {
    return at().row * x.stride[0] + begin * x.stride[1] + at().head * x.stride[2] + at().first;
  }
  __device__ __forceinline__ int64_t of_group(const View& x, int begin) const {
    return at().row * x.stride[0] + begin * x.stride[1] + at().group * x.stride[2];
  }
  __device__ __forceinline__ TwoFloats L(int token) const { return {steps().high[token], steps().low[token]}; }
  // exp(L at the end of 16 tokens i - L at the end of 16 tokens j), j = -1: the beginning of the chunk.
  __device__ __forceinline__ float between(int i, int j) const {
    return ex2(difference(i < 0 ? TwoFloats{} : L(16 * i + 15), j < 0 ? TwoFloats{} : L(16 * j + 15)));
  }

  // The chunk's `tokens` tokens from token `begin` on.
  __device__ __forceinline__ void fetch_states(const View& x, const Rows<N>& to, int begin, int tokens) const {
    const auto* const from = static_cast<const __nv_bfloat16*>(x.data) + of_group(x, begin);
    to.copy(opaque(int(threadIdx.x)), int(blockDim.x), from, x.stride[1], tokens, int(s.states));
  }
  __device__ __forceinline__ void fetch_rows(const Rows<kRows>& to, int begin, int tokens) const {
    const auto* const from = static_cast<const __nv_bfloat16*>(s.x.data) + of_head(s.x, begin);
    to.copy(opaque(lane), 32, from, s.x.stride[1], tokens, at().rows);
  }
  // The bits of dt as they are: to ask what they mean would be to wait for them.
  __device__ __forceinline__ void load_dt(unsigned (&dt)[2], int begin, int tokens) const {
    const int64_t step = s.dt.stride[1], from = at().row * s.dt.stride[0] + (begin + 2 * lane) * step + at().head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = 2 * lane + i < tokens;
      if (s.dt.type == DType::f32) dt[i] = there ? static_cast<const uint32_t*>(s.dt.data)[from + i * step] : 0u;
      else dt[i] = there ? static_cast<const uint16_t*>(s.dt.data)[from + i * step] : 0u;
    }
  }
  // delta of those tokens, 0 where there are none.
  __device__ __forceinline__ void convert_dt(float (&delta)[2], const unsigned (&dt)[2], int tokens) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = s.dt.type == DType::f32    ? __uint_as_float(dt[i])
                      : s.dt.type == DType::bf16 ? low_half(dt[i])
                                                 : __half2float(__ushort_as_half(static_cast<unsigned short>(dt[i])));
      delta[i] = 2 * lane + i < tokens ? step_size(s, x, at().head) : 0.f;
    }
  }

  // The scores C B^T, dealt out over the warps of the block, each element to the lane that will have it in operand A.
  __device__ __forceinline__ void compute_scores(int stage) const {
    for (int block = opaque(int(threadIdx.x)) / 32; block < kScores; block += int(blockDim.x) / 32) {
      const int i = block < 1 ? 0 : block < 3 ? 1 : block < 6 ? 2 : 3, j = block - i * (i + 1) / 2;
      float sum[2][2][4] = {};
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        unsigned c[4], b[4];
        C().template load<false>(c, i, 2 * k, lane);
        B(stage).template load<false>(b, j, 2 * k, lane);
        mma<__nv_bfloat16>(sum[k % 2][0], c, {b[0], b[2]});
        mma<__nv_bfloat16>(sum[k % 2][1], c, {b[1], b[3]});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<4> both;
#pragma unroll
        for (int r = 0; r < 4; ++r) both[r] = sum[0][half][r] + sum[1][half][r];
        store_vec<4>(score(block, half), both);
      }
    }
  }
};

}  // namespace
}  // namespace pyseq
