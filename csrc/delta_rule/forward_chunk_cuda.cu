// The form in chunks of 16 tokens, on tensor cores: a block has a head and 64 columns of its state, a warp 16 of them,
// transposed in the registers of its products, so that each product is an operand of the next.
#include "delta_rule/chunk.cuh"

namespace pyseq {
namespace {

constexpr int kSteps = kKeys / 16;

// 16 columns by 64 keys: of part k, key 16 k + 8 n + 2 t + r % 2 and column g + 8 (r / 2), where lane is 4 g + t.
struct State {
  Result v[kSteps];
};

template <class Function> __device__ __forceinline__ void each_state(int lane, const Function& f) {
#pragma unroll
  for (int i = 0; i < 8 * kSteps; ++i)
    f(i / 8, i / 4 % 2, i % 4, i / 8 * 16 + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2, lane / 4 + i % 4 / 2 * 8);
}

// `rounded`: all data is bfloat16 and so is y, whose operands may be rounded to 11 bits. Those of the state keep 22.
template <bool kCorrect, bool rounded> struct Walk {
  const Chunk<kCorrect>& c;
  int columns;   // of the warp that exist

  __device__ __forceinline__ int64_t states(int64_t i) const {
    return (i * c.s.heads + c.head) * c.s.keys * c.s.values + c.first + 16 * c.warp;
  }
  __device__ __forceinline__ void load_state(State& S, const float* from, float otherwise) const {
    each_state(c.lane, [&](int k, int n, int r, int key, int column) {
      const bool there = key < c.s.keys && column < columns;
      S.v[k][n][r] = !there ? 0.f : from ? from[key * c.s.values + column] : otherwise;
    });
  }
  __device__ __forceinline__ void store_state(float* to, const State& S) const {
    each_state(c.lane, [&](int k, int n, int r, int key, int column) {
      if (key < c.s.keys && column < columns) to[key * c.s.values + column] = S.v[k][n][r];
    });
  }

  // P^T and Y^T of the chunk as far as its first `tokens` tokens decide them: the others, which count zero times, may
  // be infinite or NaN. Of y either all of it or, `one`, the last of them.
  __device__ __forceinline__ void output(Result& y, Result& p, const State& S, const Full::A& all, int tokens,
                                         bool one) const {
    const int lane = c.lane;
    const Full::A v = first_terms(all, tokens, lane);
    Result sum{};
    if constexpr (kCorrect) {
      Result r{};
      clear(p);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) multiply<false>(r, Full::computed(S.v[k]), read(16, k));
      multiply<rounded>(r, v, score(kAK));
      multiply<false>(p, first_terms(Full::computed(r), tokens, lane), score(kM));
      multiply_y<false>(sum, first_terms(Full::computed(p), tokens, lane), score(kQB));
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) multiply_y<false>(sum, Full::computed(S.v[k]), read(0, k));
    multiply_y<rounded>(sum, v, score(kQK));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (!one || token == tokens - 1) y[i / 4][i % 4] = sum[i / 4][i % 4];
    }
  }

  // S exp(gl) + V^T K + P^T B: the tokens' sum first, since tensor cores do not round theirs to nearest.
  __device__ __forceinline__ void advance(State& S, const Result& p, const Full::A& v) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Result sum{};
      multiply<rounded>(sum, v, written(0, k));
      if constexpr (kCorrect) multiply<false>(sum, Full::computed(p), written(16, k));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Vec<2> last = load_vec<2>(c.floats(Place::kLast) + 16 * k + 8 * n + c.lane % 4 * 2);
#pragma unroll
        for (int r = 0; r < 4; ++r) S.v[k][n][r] = fmaf(last[r % 2], S.v[k][n][r], sum[n][r]);
      }
    }
  }

  __device__ __forceinline__ void store_y(const Result& y, int t) const {
    using At = Place;
    float* const tile = c.floats(At::kLevel) + c.warp * kChunk * At::kStrideY;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + c.lane % 4 * 2 + i % 2, column = c.lane / 4 + i % 4 / 2 * 8;
      tile[token * At::kStrideY + column] = c.s.scale * y[i / 4][i % 4];
    }
    __syncwarp();
    const int64_t base = c.span.row * c.s.y.stride[0] + c.head * c.s.y.stride[2] + c.first + 16 * c.warp;
#pragma unroll
    for (int i = c.lane; i < kChunk * 4; i += 32) {
      const int token = i / 4, column = i % 4 * 4;
      const Vec<4> row = load_vec<4>(tile + token * At::kStrideY + column);
      if (t + token >= c.span.end) continue;
      const int64_t at = base + (t + token) * c.s.y.stride[1] + column;
      store_vec<4>(c.s.y, at, row, c.p.wide_y, within(4, columns - column));
    }
  }

  __device__ __forceinline__ void walk(State& S, int t) const {
    const Full::A v = Full::load_a<true>({c.v() + 16 * c.warp, Place::kStrideV}, c.lane);
    Result y, p{};
    bool one = false;
#pragma unroll 1
    for (int tokens = kChunk; tokens <= kChunk; ++tokens) {
      output(y, p, S, v, tokens, one);
      if (!one && late(y, S)) one = true, tokens = 0;
    }
    store_y(y, t);
    advance(S, p, v);
  }

 private:
  __device__ __forceinline__ Full::B read(int row, int k) const {
    return c.read().template b<false>(row, 16 * k, c.lane);
  }
  __device__ __forceinline__ Full::B written(int row, int k) const {
    return c.written().template b<true>(row, 16 * k, c.lane);
  }
  __device__ __forceinline__ Full::B score(int i) const { return c.scores(i).template b<false>(0, 0, c.lane); }
  template <bool exact>
  static __device__ __forceinline__ void multiply_y(Result& d, const Full::A& a, const Full::B& b) {
    if constexpr (rounded) multiply_rounded(d, a, b);
    else multiply<exact>(d, a, b);
  }
  static __device__ __forceinline__ void clear(Result& d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = 0.f;
  }
  // Whether y has NaN that the state before does not have: tokens have it that came after those of some y.
  static __device__ __forceinline__ bool late(const Result& y, const State& S) {
    bool wrong = false, before = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) wrong |= y[i / 4][i % 4] != y[i / 4][i % 4];
    if (!__any_sync(~0u, wrong)) return false;
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) before |= S.v[i / 8][i / 4 % 2][i % 4] != S.v[i / 8][i / 4 % 2][i % 4];
    return !__any_sync(~0u, before);
  }
};

template <bool kCorrect, bool rounded>
__global__ void __launch_bounds__(kThreads, 2) delta_rule_chunk_kernel(DeltaRule s, ChunkPlan p) {
  const int unit = int(blockIdx.x) / p.blocks, head = unit % int(s.heads), sequence = unit / int(s.heads);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const Chunk<kCorrect> c{s,    p, dynamic_smem<unsigned char>(), span_of(s, sequence),
                              head, int(blockIdx.x) % p.blocks * kColumns, lane, warp};
  const Span& span = c.span;
  const Walk<kCorrect, rounded> w{c, within(16, int(s.values) - c.first - 16 * warp)};
  State S;
  w.load_state(S, s.state && span.valid ? s.state + w.states(sequence) : nullptr, span.valid ? 0.f : not_a_number());
  float decay = 0.f;
  c.clear_scores();
  if (span.begin < span.end) {
    c.fetch(span.begin);
    decay = c.fetch_decay(span.begin);
  }
#pragma unroll 1
  for (int t = span.begin; t < span.end; t += kChunk) {
    cp_async_wait_all();
    __syncthreads();   // the chunk is there, and the one before has been used
    c.prepare(decay);
    __syncthreads();
    if (t + kChunk < span.end) {
      c.fetch(t + kChunk);
      decay = c.fetch_decay(t + kChunk);
    }
    if (w.columns == 0) continue;
    const int done = t - span.begin;
    if (s.kept && span.valid && done % kDeltaKeep == 0)
      w.store_state(s.kept + w.states(span.slot + done / kDeltaKeep), S);
    w.walk(S, t);
  }
  if (s.state_out) w.store_state(s.state_out + w.states(sequence), S);
}

ChunkPlan plan(const DeltaRule& s) {
  ChunkPlan p{};
  p.blocks = int((s.values + kColumns - 1) / kColumns);
  p.bytes = Place::kRaw;
  const auto stage_eight = [&](const View& x) { return stage(x, 3, kChunk * kKeys, p.bytes, 8); };
  p.q = stage_eight(s.q);
  p.k = stage_eight(s.k);
  p.a = stage_eight(s.a);
  p.b = stage_eight(s.b);
  p.g = stage_eight(s.one_decay ? View{} : s.g);
  p.v = stage_eight(s.v);
  p.wide_y = vectorisable(s.y, 4, 3);
  return p;
}

static_assert(Place::kRaw + 6 * 4 * kChunk * kKeys <= 99 * 1024);

template <bool kCorrect, bool rounded> int walk(const DeltaRule& s, void* stream) {
  const ChunkPlan p = plan(s);
  const int64_t blocks = s.sequences * s.heads * p.blocks;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const dim3 grid = unsigned(blocks), block = kThreads;
  return launch<delta_rule_chunk_kernel<kCorrect, rounded>>(grid, block, size_t(p.bytes), stream, s, p);
}

}  // namespace

bool delta_rule_chunks_fit(const DeltaRule& s) { return s.keys <= kKeys; }

int delta_rule_chunk_cuda(const DeltaRule& s, void* stream) {
  bool bf16 = true;
  for (const View& x : {s.q, s.k, s.a, s.b, s.v}) bf16 = bf16 && (!x || x.type == DType::bf16);
  if (s.a) return bf16 ? walk<true, true>(s, stream) : walk<true, false>(s, stream);
  return bf16 ? walk<false, true>(s, stream) : walk<false, false>(s, stream);
}

}  // namespace pyseq
