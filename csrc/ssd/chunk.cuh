// The parts of a chunk of Q tokens as a block of the fused form has them: what lies where in shared memory, how it gets
// there, and the sums of delta A.
//
// B, C and x wait as rows of 16-byte units, one row a token. Rows of B and C are a unit apart, and the units of x move
// within their row by bits of the row's number, so that ldmatrix reads 8 rows without two in one bank.
#pragma once
#include "cuda/async.cuh"
#include "cuda/mma.cuh"
#include "ssd/forward.cuh"

namespace pyseq {
namespace {

constexpr int kRows = 32;                               // of a head's state: those of a warp
constexpr int kScores = kQ / 16 * (kQ / 16 + 1) / 2;    // blocks of 16 x 16 on and below the diagonal
constexpr int kUnit = 8;                                // elements of 16 bytes

// A matrix of kQ tokens and `width` columns in bfloat16.
template <int width> struct Rows {
  static constexpr int kUnits = width / kUnit, kPitch = width * 2 + (kUnits >= 8 ? 16 : 0), kBytes = kQ * kPitch;
  unsigned char* memory;

  __device__ __forceinline__ unsigned char* at(int token, int unit) const {
    return memory + token * kPitch + (kUnits >= 8 ? unit : unit ^ (token >> 1 & 3)) * 16;
  }
  // Copies what thread i of n copies: neighbours have neighbouring units. Zeros for tokens from `tokens` on and columns
  // from `columns` on.
  __device__ __forceinline__ void copy(int i, int n, const __nv_bfloat16* from, int64_t stride, int tokens,
                                       int columns) const {
    int token = i / kUnits;
    const int unit = i % kUnits, bytes = unit * kUnit < columns ? 16 : 0, step = n / kUnits;
    from += token * stride + unit * kUnit;
    unsigned char* to = at(token, unit);   // steps are of 8 tokens: units move alike
    for (; token < kQ; token += step, from += step * stride, to += step * kPitch)
      cp_async<16>(to, from, token < tokens ? bytes : 0);
  }
  // Tokens 16 i, .. of units u and u + 1, as mma takes 16 x 16 from A; transposed as it takes them from B, or A^T.
  template <bool transposed> __device__ __forceinline__ void load(unsigned (&r)[4], int i, int u, int lane) const {
    ldmatrix<4, transposed>(r, at(16 * i + lane % 16, u + lane / 16));
  }
};

// What a warp keeps of its head's steps, per token: L as the sum of two floats, in powers of 2; delta; and of its 16
// tokens, exp(L - L before them) and exp(L at their end - L) delta. Across them exponentials are products of such.
struct Steps {
  float high[kQ], low[kQ], delta[kQ], row[kQ], column[kQ];
};

struct TwoFloats {
  float high, low;
};
__device__ __forceinline__ TwoFloats operator+(const TwoFloats& a, const TwoFloats& b) {   // Knuth's sum
  const float sum = a.high + b.high, of_b = sum - a.high;
  return {sum, (a.high - (sum - of_b)) + (b.high - of_b) + a.low + b.low};
}
__device__ __forceinline__ float difference(const TwoFloats& a, const TwoFloats& b) {
  return (a.high - b.high) + (a.low - b.low);
}

// A lane brings delta of tokens 2 lane and 2 lane + 1, 0 beyond the end: L[Q] is that of the last token.
__device__ __forceinline__ void sum_steps(Steps& to, const float (&delta)[2], float A, int lane) {
  const TwoFloats first{__fmul_rn(log_decay(delta[0], A), kLog2e), 0.f};   // rounded once: never fused into a sum
  const TwoFloats second{__fmul_rn(log_decay(delta[1], A), kLog2e), 0.f};
  TwoFloats sum = first + second;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const TwoFloats before{__shfl_up_sync(~0u, sum.high, d), __shfl_up_sync(~0u, sum.low, d)};
    if (lane >= d) sum = before + sum;
  }
  const TwoFloats before{__shfl_up_sync(~0u, sum.high, 1), __shfl_up_sync(~0u, sum.low, 1)};
  const TwoFloats L[2] = {lane ? before + first : first, sum};
  const int last = lane | 7;   // 8 lanes have 16 tokens
  const TwoFloats after{__shfl_sync(~0u, sum.high, last), __shfl_sync(~0u, sum.low, last)};
  const TwoFloats carried{__shfl_sync(~0u, sum.high, (last - 8) & 31), __shfl_sync(~0u, sum.low, (last - 8) & 31)};
  const TwoFloats start = lane < 8 ? TwoFloats{} : carried;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = 2 * lane + i;
    to.row[token] = ex2(difference(L[i], start));
    to.column[token] = ex2(difference(after, L[i])) * delta[i];
    to.high[token] = L[i].high;
    to.low[token] = L[i].low;
    to.delta[token] = delta[i];
  }
}

// The two numbers of a word, as the bits of a float and as floats.
__device__ __forceinline__ unsigned low_word(unsigned word) { return word << 16; }
__device__ __forceinline__ unsigned high_word(unsigned word) { return word & 0xffff0000u; }
__device__ __forceinline__ float low_half(unsigned word) { return __uint_as_float(low_word(word)); }
__device__ __forceinline__ float high_half(unsigned word) { return __uint_as_float(high_word(word)); }
__device__ __forceinline__ unsigned pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Four neighbouring lanes with four words each: lane t is left with word t of each.
__device__ __forceinline__ void transpose(unsigned (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const unsigned got = __shfl_xor_sync(~0u, upper ? w[j] : w[j | bit], bit);
      (upper ? w[j] : w[j | bit]) = got;
    }
  }
}

}  // namespace
}  // namespace pyseq
