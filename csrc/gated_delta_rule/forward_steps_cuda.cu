// The sequential form, token by token in the arithmetic of the step: each warp of a block walks a tile of the state of
// one head through a sequence, in its registers. Tokens come in kTokens at a time, while those before are computed.
#include "cuda/staging.cuh"
#include "gated_delta_rule/forward.cuh"

namespace pyseq {
namespace {

template <int L, int F> constexpr int kTokens = 1024 / kTileKeys<L, F> < 16 ? 1024 / kTileKeys<L, F> : 16;
template <int L> constexpr int kColumns = kWarps * kTileColumns<L>;   // of a block

// Shared memory, in floats: rows of kTokens tokens; the decays of one per head, or ones, a token's four times; beta;
// then the tensors as they came.
template <int L, int F> struct Place {
  static constexpr int kRows = kTokens<L, F> * kTileKeys<L, F>;
  static constexpr int kQ = 0, kK = kRows, kDecays = 2 * kRows, kV = 3 * kRows,
                       kSteps = kV + kTokens<L, F> * kColumns<L>, kBeta = kSteps + 4 * kTokens<L, F>,
                       kFloats = kBeta + kTokens<L, F>;
};

struct Plan {
  int blocks;          // of a head
  Staged q, k, g, v;   // g: one for each key
  int bytes;
};

template <int L, int F> Plan plan(const GatedDeltaRule& s) {
  using At = Place<L, F>;
  Plan p{};
  p.blocks = int((s.values + kColumns<L> - 1) / kColumns<L>);
  p.bytes = At::kFloats * 4;
  p.q = stage(s.q, 3, At::kRows, p.bytes);
  p.k = stage(s.k, 3, At::kRows, p.bytes);
  p.g = stage(s.one_decay ? View{} : s.g, 3, At::kRows, p.bytes);
  p.v = stage(s.v, 3, kTokens<L, F> * kColumns<L>, p.bytes);
  return p;
}

template <int L, int F> struct Tokens {
  using At = Place<L, F>;
  static constexpr int kN = kTokens<L, F>;

  const GatedDeltaRule& s;
  const Plan& p;
  unsigned char* memory;
  Span span;
  int head, first;   // column of the block

  __device__ __forceinline__ float* floats(int i) const { return reinterpret_cast<float*>(memory) + i; }

  template <int kWidth>
  __device__ __forceinline__ void fetch_rows(const Staged& x, int head, int t, int from, int64_t end) const {
    const int size = int(size_of(x.x.type));
    const int64_t at = span.row * x.x.stride[0] + head * x.x.stride[2];
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kN * kWidth / 4; i += kThreads) {
      const int token = t + i / (kWidth / 4), place = from + i % (kWidth / 4) * 4;
      const int count = token < span.end ? within(4, int(end) - place) : 0;
      copy_four(x, memory + x.raw + i * 4 * size, at + token * x.x.stride[1] + place, count);
    }
  }
  __device__ __forceinline__ void fetch(int t) const {
    constexpr int kKeys = kTileKeys<L, F>;
    const int shared = head / int(s.value_heads / s.heads);
    fetch_rows<kKeys>(p.q, shared, t, 0, s.keys);
    fetch_rows<kKeys>(p.k, shared, t, 0, s.keys);
    if (p.g.x) fetch_rows<kKeys>(p.g, head, t, 0, s.keys);
    fetch_rows<kColumns<L>>(p.v, head, t, first, s.values);
  }
  // Of token t + threadIdx.x: beta, or the log decay where there is one for all keys.
  __device__ __forceinline__ float fetch_one(const View& x, int t) const {
    const int token = t + int(threadIdx.x);
    if (!x || int(threadIdx.x) >= kN || token >= span.end) return 0.f;
    return load(x, span.row * x.stride[0] + token * x.stride[1] + head);
  }

  template <int kSize> __device__ __forceinline__ void convert_rows(const Staged& x, int to) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kSize / 4; i += kThreads)
      store_vec<4>(floats(to) + i * 4, staged_four(memory, x, i));
  }
  __device__ __forceinline__ void convert(float decay, float beta) const {
    convert_rows<At::kRows>(p.q, At::kQ);
    convert_rows<At::kRows>(p.k, At::kK);
    convert_rows<kN * kColumns<L>>(p.v, At::kV);
    if (int(threadIdx.x) < kN) floats(At::kBeta)[threadIdx.x] = beta;
    if (p.g.x) {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < At::kRows / 4; i += kThreads) {
        Vec<4> w = staged_four(memory, p.g, i);
#pragma unroll
        for (int e = 0; e < 4; ++e) w[e] = decay_of(w[e]);
        store_vec<4>(floats(At::kDecays) + i * 4, w);
      }
    } else if (int(threadIdx.x) < kN) {
      const float w = decay_of(decay);
      store_vec<4>(floats(At::kSteps) + 4 * int(threadIdx.x), Vec<4>{w, w, w, w});
    }
  }
};

template <int L, int F>
__global__ void __launch_bounds__(kThreads, F < 4 ? 4 : 3) gated_delta_rule_steps_kernel(GatedDeltaRule s, Plan p) {
  using At = Place<L, F>;
  constexpr int kN = kTokens<L, F>;
  const int lane = int(threadIdx.x % 32), heads = int(s.value_heads);
  const int unit = int(blockIdx.x) / p.blocks, head = unit % heads, sequence = unit / heads;
  const int block_first = int(blockIdx.x) % p.blocks * kColumns<L>;
  const int own = int(threadIdx.x / 32) * kTileColumns<L> + lane / L * 4, first = block_first + own;
  const int columns = within(4, int(s.values) - first);
  const Tokens<L, F> tokens{s, p, dynamic_smem<unsigned char>(), span_of(s, sequence), head, block_first};
  const Span& span = tokens.span;
  const int64_t size = s.keys * s.values;
  const auto place = [&](float* states, int64_t i) {
    return TilePlace<L, float>{states + (i * heads + head) * size + first, s.values, lane, int(s.keys), columns};
  };
  StateTile<F> S;
  if (s.state && span.valid) load_tile(S, place(const_cast<float*>(s.state), sequence));
  else fill_tile(S, span.valid ? 0.f : not_a_number());
  // Where a token's decays lie: for each key, or four for all of them.
  const int every = p.g.x ? kTileKeys<L, F> : 4, every_f = p.g.x ? 4 * L : 0;
  const int mine = lane % L * 4, decays = p.g.x ? At::kDecays + mine : At::kSteps;
  const View one = s.one_decay ? s.g : View{};
  float decay = 0.f, beta = 0.f;
  if (span.begin < span.end) {
    tokens.fetch(span.begin);
    decay = tokens.fetch_one(one, span.begin);
    beta = tokens.fetch_one(s.beta, span.begin);
  }
#pragma unroll 1
  for (int t = span.begin; t < span.end; t += kN) {
    cp_async_wait_all();
    __syncthreads();   // what was copied is there, and the tokens before have been used
    tokens.convert(decay, beta);
    __syncthreads();
    if (t + kN < span.end) {
      tokens.fetch(t + kN);
      decay = tokens.fetch_one(one, t + kN);
      beta = tokens.fetch_one(s.beta, t + kN);
    }
    const int done = t - span.begin;
    if (s.kept && span.valid && done % kGatedDeltaKeep == 0)
      store_tile(S, place(s.kept, span.slot + done / kGatedDeltaKeep));
    const int count = min(kN, span.end - t);
    int64_t y_at = span.row * s.y.stride[0] + t * s.y.stride[1] + head * s.y.stride[2] + first + sum_row(lane);
#pragma unroll 1
    for (int i = 0; i < count; ++i, y_at += s.y.stride[1]) {
      const auto row = [&](int from) {
        return [=, &tokens](int f) {
          return load_vec<4>(tokens.floats(from) + i * kTileKeys<L, F> + f * 4 * L + mine);
        };
      };
      const auto w = [&](int f) { return load_vec<4>(tokens.floats(decays) + i * every + f * every_f); };
      const Vec<4> v = load_vec<4>(tokens.floats(At::kV) + i * kColumns<L> + own);
      const Vec<4> part = advance<L>(S, v, tokens.floats(At::kBeta)[i], row(At::kQ), row(At::kK), w);
      const float y = s.scale * sum_over_lanes<L>(part, lane);
      if (lane % L < 4 && sum_row(lane) < columns) store(s.y, y_at, y);
    }
  }
  if (s.state_out) store_tile(S, place(s.state_out, sequence));
}

static_assert(kGatedDeltaKeep % kTokens<4, 1> == 0 && kGatedDeltaKeep % kTokens<16, 4> == 0);

template <int L, int F> int walk(const GatedDeltaRule& s, void* stream) {
  const Plan p = plan<L, F>(s);
  const int64_t blocks = s.sequences * s.value_heads * p.blocks;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const dim3 grid = unsigned(blocks), block = kThreads;
  return launch<gated_delta_rule_steps_kernel<L, F>>(grid, block, size_t(p.bytes), stream, s, p);
}

}  // namespace

int gated_delta_rule_steps_cuda(const GatedDeltaRule& s, void* stream) {
  return for_keys(s.keys, [&]<int L, int F>() { return walk<L, F>(s, stream); });
}

}  // namespace pyseq
