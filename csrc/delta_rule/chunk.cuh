// What a block of the form in chunks has of a chunk of 16 tokens in shared memory, and what it computes before the
// state comes in: the matrices of kernel.h that are of one chunk alone.
//
// Between tokens j < i there are the decays of j + 1 to i. They are the product of two, of which neither is divided by:
// in the smallest of the blocks of 2, 4, 8 and 16 tokens that has both, j is in its first half and i in its second, and
// the decays from j to the end of the first are a factor of row j, those from there to i one of row i. So the matrices
// are sums over four levels, each of half of the rows by the other half, masked; and the diagonal.
#pragma once
#include "cuda/panel.cuh"
#include "cuda/staging.cuh"
#include "delta_rule/forward.cuh"

namespace pyseq {
namespace {

constexpr int kChunk = 16, kKeys = 64, kColumns = 64;   // of a block; a warp has 16 of the columns
constexpr int kLevels = 4;

struct Place {   // bytes
  using Level = Panel<32, kKeys>;        // rows of the second halves: q, a; of the first: k, b; 8 each
  using Read = Panel<32, kKeys>;         // q exp(gi), a exp(ge); 16 each
  using Written = Panel<32, kKeys, 4>;   // k exp(gl - gi), b exp(gl - gi)
  using Scores = Panel<16, 16>;          // Aqk, Aqb, Aak, M: row i, column j
  static constexpr int kStrideN = 20, kStrideV = kColumns + 4, kStrideY = 20;
  static constexpr int kDecays = 0, kLast = kDecays + 4 * kChunk * kKeys, kLevel = kLast + 4 * kKeys,
                       kRead = kLevel + kLevels * Level::kBytes, kWritten = kRead + Read::kBytes,
                       kScores = kWritten + Written::kBytes, kN = kScores + 4 * Scores::kBytes,
                       kV = kN + 4 * kChunk * kStrideN, kRaw = kV + 4 * kChunk * kStrideV;
  static_assert(4 * kWarps * kChunk * kStrideY <= kLevels * Level::kBytes);   // y of each warp, where levels were
};

struct ChunkPlan {
  int blocks;              // of a head
  Staged q, k, a, b, g, v;   // g: one for each key
  bool wide_y;
  int bytes;
};

enum Score { kQK, kQB, kAK, kM };

template <bool kCorrect> struct Chunk {
  using At = Place;

  const DeltaRule& s;
  const ChunkPlan& p;
  unsigned char* memory;
  Span span;
  int head, first;   // column of the block
  int lane, warp;

  __device__ __forceinline__ float* floats(int byte) const { return reinterpret_cast<float*>(memory + byte); }
  __device__ __forceinline__ At::Level level(int i) const { return {floats(At::kLevel + i * At::Level::kBytes)}; }
  __device__ __forceinline__ At::Read read() const { return {floats(At::kRead)}; }
  __device__ __forceinline__ At::Written written() const { return {floats(At::kWritten)}; }
  __device__ __forceinline__ At::Scores scores(int i) const { return {floats(At::kScores + i * At::Scores::kBytes)}; }
  __device__ __forceinline__ float* v() const { return floats(At::kV); }

  // A thread copies 16 bytes of a token at a time, or elements one by one.
  template <int each> __device__ __forceinline__ void fetch_each(const Staged& x, int t, int from, int64_t end) const {
    static_assert(kKeys == kColumns && kChunk * kKeys / 8 == kThreads);
    const int size = int(size_of(x.x.type));
    const int64_t base = span.row * x.x.stride[0] + head * x.x.stride[2];
#pragma unroll
    for (int i = int(threadIdx.x); i < kChunk * kKeys / each; i += kThreads) {
      const int token = t + i / (kKeys / each), place = from + i % (kKeys / each) * each;
      const int count = token < span.end ? within(each, int(end) - place) : 0;
      unsigned char* const to = memory + x.raw + i * each * size;
      const int64_t at = base + token * x.x.stride[1] + place;
      if (each == 8 && x.wide) {
        cp_async<16>(to, static_cast<const unsigned char*>(x.x.data) + at * size, count * size);
      } else {
#pragma unroll
        for (int part = 0; part < each; part += 4) copy_four(x, to + part * size, at + part, within(4, count - part));
      }
    }
  }
  __device__ __forceinline__ void fetch_rows(const Staged& x, int t, int from, int64_t end) const {
    if (x.x.type == DType::f32) fetch_each<4>(x, t, from, end);
    else fetch_each<8>(x, t, from, end);
  }
  __device__ __forceinline__ void fetch(int t) const {
    fetch_rows(p.q, t, 0, s.keys);
    fetch_rows(p.k, t, 0, s.keys);
    if constexpr (kCorrect) {
      fetch_rows(p.a, t, 0, s.keys);
      fetch_rows(p.b, t, 0, s.keys);
    }
    if (p.g.x) fetch_rows(p.g, t, 0, s.keys);
    fetch_rows(p.v, t, first, s.values);
  }
  // The log decay of the token whose keys this thread converts, where there is one for all keys.
  __device__ __forceinline__ float fetch_decay(int t) const {
    const int token = t + int(threadIdx.x) / (kKeys / 8);
    if (!s.g || !s.one_decay || token >= span.end) return 0.f;
    return load(s.g, span.row * s.g.stride[0] + token * s.g.stride[1] + head);
  }

  __device__ __forceinline__ void convert(float decay) const {
    const int i = int(threadIdx.x), token = i / (kKeys / 8), column = i % (kKeys / 8) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec<4> w = p.g.x ? staged_four(memory, p.g, 2 * i + half) : Vec<4>{decay, decay, decay, decay};
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = decay_of(w[e]);
      store_vec<4>(floats(At::kDecays) + i * 8 + half * 4, w);
      store_vec<4>(v() + token * At::kStrideV + column + half * 4, staged_four(memory, p.v, 2 * i + half));
    }
  }

  // A warp's array, which it scales for every level and for the state: q or a, `above`, or k or b. Two keys a lane.
  using Tokens = float[kChunk][2];
  template <bool above, int l>
  __device__ __forceinline__ void scale_level(const Tokens& x, Tokens& factor, Tokens& decays, int at) const {
    constexpr int h = 1 << l;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int i = r / h * 2 * h + r % h + (above ? h : 0), other = i / h ^ 1;
      store_vec<2>(level(l).place(at + r, 2 * lane), Vec<2>{x[i][0] * factor[i][0], x[i][1] * factor[i][1]});
#pragma unroll
      for (int e = 0; e < 2; ++e) factor[i][e] *= decays[other][e];
    }
#pragma unroll
    for (int b = 0; b < kChunk / 2 / h; ++b)   // of blocks of 2 h tokens
#pragma unroll
      for (int e = 0; e < 2; ++e) decays[b][e] = decays[2 * b][e] * decays[2 * b + 1][e];
  }
  template <bool above>
  __device__ __forceinline__ void scale(const Staged& raw, int at_level, int at_rows, bool inclusive) const {
    Tokens x, factor, decays;
    const View array{memory + raw.raw, raw.x.type, {}};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Vec<2> pair = load_vec<2>(array, i * kKeys + 2 * lane, true);
      const Vec<2> w = load_vec<2>(floats(At::kDecays) + i * kKeys + 2 * lane);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[i][e] = pair[e];
        decays[i][e] = w[e];
        factor[i][e] = above && inclusive ? w[e] : 1.f;
      }
    }
    scale_level<above, 0>(x, factor, decays, at_level);
    scale_level<above, 1>(x, factor, decays, at_level);
    scale_level<above, 2>(x, factor, decays, at_level);
    scale_level<above, 3>(x, factor, decays, at_level);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      store_vec<2>(above ? read().place(at_rows + i, 2 * lane) : written().place(at_rows + i, 2 * lane),
                   Vec<2>{x[i][0] * factor[i][0], x[i][1] * factor[i][1]});
    if (!above && at_rows == 0) store_vec<2>(floats(At::kLast) + 2 * lane, Vec<2>{decays[0][0], decays[0][1]});
  }
  __device__ __forceinline__ void scale_all() const {
    if (warp == 0) scale<true>(p.q, 0, 0, true);
    if (warp == 1) scale<false>(p.k, 16, 0, false);
    if constexpr (kCorrect) {
      if (warp == 2) scale<true>(p.a, 8, 16, false);
      if (warp == 3) scale<false>(p.b, 24, 16, false);
    }
  }

  // The warp's level of the matrices.
  __device__ __forceinline__ void multiply_level() const {
    Result d{};
#pragma unroll
    for (int k = 0; k < kKeys; k += 16)
      multiply<false>(d, level(warp).a(0, k, lane), level(warp).template b<false>(16, k, lane));
    const int h = 1 << warp;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4, r = i % 4, row = lane / 4, column = lane % 4 * 2 + r % 2;
      const int to = row / h * 2 * h + row % h + h, from = column / h * 2 * h + column % h;
      if (row / h != column / h) continue;
      if (r / 2 == 0) {
        if (kCorrect || n == 0) *scores(n ? kQB : kQK).place(to, from) = d[n][r];
      } else if (kCorrect) {
        if (n == 0) *scores(kAK).place(to, from) = d[n][r];
        else floats(At::kN)[to * At::kStrideN + from] = d[n][r];
      }
    }
  }
  // q k or q b of a token by itself: two lanes a token.
  __device__ __forceinline__ void diagonal(const Staged& other, int score) const {
    const View q{memory + p.q.raw, p.q.x.type, {}}, x{memory + other.raw, other.x.type, {}};
    const int token = lane / 2, from = token * kKeys + lane % 2 * (kKeys / 2);
    float sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < kKeys / 2; i += 4) {
      const Vec<4> left = load_vec<4>(q, from + i, true), right = load_vec<4>(x, from + i, true);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(left[e], right[e], sum);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (lane % 2 == 0) *scores(score).place(token, token) = sum;
  }
  // M = (I - N)^-1, a column to a lane, by substitution.
  __device__ __forceinline__ void invert() const {
    const int column = lane % kChunk;
    float m[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        const Vec<4> n = load_vec<4>(floats(At::kN) + i * At::kStrideN + j);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j + e < i) sum[e % 2] = fmaf(n[e], m[j + e], sum[e % 2]);
      }
      m[i] = sum[0] + sum[1];
      if (lane < kChunk) *scores(kM).place(i, column) = m[i];
    }
  }
  __device__ __forceinline__ void clear_scores() const {   // above the diagonal they stay zero
    uint32_t* const words = reinterpret_cast<uint32_t*>(memory + At::kScores);
    for (int i = int(threadIdx.x); i < (At::kV - At::kScores) / 4; i += kThreads) words[i] = 0u;
  }

  // All of this for the chunk that was fetched; barriers before and after.
  __device__ __forceinline__ void prepare(float decay) const {
    convert(decay);
    __syncthreads();
    scale_all();
    __syncthreads();
    multiply_level();
    if (warp == 3) diagonal(p.k, kQK);
    __syncthreads();
    if constexpr (kCorrect) {
      if (warp == 0) invert();
      if (warp == 1) diagonal(p.b, kQB);
    }
  }
};

}  // namespace
}  // namespace pyseq
