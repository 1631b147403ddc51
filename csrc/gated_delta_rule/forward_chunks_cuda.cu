// The fused form, for q, k and v in bfloat16 and no decay or one per head: a block walks the chunks of a sequence for
// 64 columns of the state of one head. Four warps have 16 columns each, all keys of them, in float32: S^T as mma
// accumulates it, which is also how it takes S^T as its operand A. Nothing goes between them; a fifth warp works one
// chunk ahead.
//
//   X = beta (V - (K S) o in)    U = T X    Y = scale (Q S) o in + Aqk U    S' = in[15] S + K^T (U o out)
//
// transposed, so that each is the next one's operand. What is computed, S, X, U and T, is multiplied in three parts of
// bfloat16 where the product reaches the state, in two on the way to y; k, q and v are what they are. K and V are
// multiples of 8, K at most 128, rows begin at 16 bytes; all else is left to the sequential form.
#include "cuda/barrier.cuh"
#include "gated_delta_rule/tile.cuh"

namespace pyseq {
namespace {

constexpr int kBlockThreads = 32 * (kColumnWarps + 1);

__device__ __forceinline__ void meet() { named_barrier(1, kBlockThreads); }   // from either kind of warp

template <int KT> struct Columns {
  Result S[KT];   // S^T: [16 columns, 16 keys] each
};

// d += A B^T, both in n parts: all products of parts but those below the last bits.
template <int n>
__device__ __forceinline__ void add_parts(Result& d, const InParts<n>& a, const Bf16 (&b)[n][kC * kSmallStride],
                                          int lane) {
#pragma unroll
  for (int p = n - 1; p >= 0; --p) {
    const auto part = Parts::load_b<true>(Halves{b[p], kSmallStride}, lane);
#pragma unroll
    for (int q = n - 1 - p; q >= 0; --q) Parts::multiply(d, a.part[q], part);
  }
}

template <int KT> struct Consumer {
  const GatedDeltaRule& s;
  Memory<KT>& m;
  Span span;
  int head, first, own, lane;   // the block's first column, the warp's in it

  __device__ __forceinline__ void load_state(Columns<KT>& c, const float* from, float otherwise) const {
    each_place(c, [&](float& x, int place, bool there) { x = from && there ? from[place] : there ? otherwise : 0.f; });
  }
  __device__ __forceinline__ void store_state(Columns<KT>& c, float* to) const {
    each_place(c, [&](float& x, int place, bool there) { if (there) to[place] = x; });
  }
  template <class Function> __device__ __forceinline__ void each_place(Columns<KT>& c, const Function& f) const {
    const int K = int(s.keys), V = int(s.values), lane = opaque(this->lane);
    int begin = lane % 4 * 2 * V + first + own + lane / 4;   // not all places at once: there are registers for few
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = first + own + lane / 4 + i / 2 * 8, key = 16 * n + half * 8 + lane % 4 * 2 + i % 2;
          f(c.S[n][half][i], begin + i % 2 * V + i / 2 * 8, key < K && column < V);
        }
        begin = opaque(begin + 8 * V);
      }
  }

  // x *= f[token], token by token.
  static __device__ __forceinline__ void by_token(Result& x, const float* f, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i / 4][i % 4] *= f[i / 4 * 8 + lane % 4 * 2 + i % 2];
  }

  __device__ __forceinline__ void advance(Columns<KT>& c, int t) const {
    const int chunk = (t - span.begin) / kC, lane = opaque(this->lane);
    Stage<KT>& from = m.stage[chunk % kStages];
    const Factors& f = m.factors[chunk % 2];
    constexpr int kStride = Stage<KT>::kStride;
    Result x{}, y{};
#pragma unroll
    for (int n = 0; n < KT; ++n) {
      const InParts<3> S(c.S[n]);
      S.multiply(x, Parts::load_b<true>(Halves{from.k + 16 * n, kStride}, lane));
      S.template multiply<2>(y, Parts::load_b<true>(Halves{from.q + 16 * n, kStride}, lane));
    }
    by_token(x, f.in, lane);
    by_token(y, f.in, lane);
    Bf16* const v = from.v + own;
    unsigned pairs[4];   // two tokens of a column each
    ldmatrix<4, true>(pairs, v + (lane % 8 + lane / 16 * 8) * kVStride + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const of = x[i / 2] + i % 2 * 2;
      of[0] = low_of(pairs[i]) - of[0];
      of[1] = high_of(pairs[i]) - of[1];
    }
    by_token(x, f.beta, lane);
    Result u{};
    add_parts(u, InParts<3>(x), f.T, lane);
    by_token(y, f.scale, lane);
    add_parts(y, InParts<2>(u), f.Aqk, lane);
    by_token(u, f.out, lane);
    const InParts<3> written(u);
    const float last = f.last;
#pragma unroll
    for (int n = 0; n < KT; ++n) {
      Result more{};   // by itself: the sum with S rounds to nearest
      written.multiply(more, Parts::load_b<false>(Halves{from.k + 16 * n, kStride}, lane));
#pragma unroll
      for (int i = 0; i < 8; ++i) c.S[n][i / 4][i % 4] = fmaf(last, c.S[n][i / 4][i % 4], more[i / 4][i % 4]);
    }
    store_y(y, v, t);
  }
  // By way of where v was, for 16 bytes at a time.
  __device__ __forceinline__ void store_y(const Result& y, Bf16* v, int t) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, column = lane / 4 + i % 4 / 2 * 8;
      store(v + token * kVStride + column, y[i / 4][i % 4]);
    }
    __syncwarp();
    const int token = t + lane / 2, column = lane % 2 * kUnit;
    if (token >= span.end || first + own + column >= int(s.values)) return;
    const int64_t to = span.row * s.y.stride[0] + token * s.y.stride[1] + head * s.y.stride[2] + first + own + column;
    *reinterpret_cast<uint4*>(static_cast<Bf16*>(s.y.data) + to) =
        *reinterpret_cast<const uint4*>(v + lane / 2 * kVStride + column);
  }
};

template <int KT>
__global__ void __launch_bounds__(kBlockThreads, 2) gated_delta_rule_chunks_kernel(GatedDeltaRule s, int blocks) {
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32), heads = int(s.value_heads);
  const int unit = int(blockIdx.x) / blocks, head = unit % heads, sequence = unit / heads;
  const int first = int(blockIdx.x) % blocks * kColumnsOfBlock;
  Memory<KT>& m = *dynamic_smem<Memory<KT>>();
  const Span span = span_of(s, sequence);
  if (warp == kColumnWarps) {
    const Producer<KT> p{s, m, span, head, head / (heads / int(s.heads)), first, lane};
    p.fetch(span.begin);
    p.fetch(span.begin + kC);
    float2 token = p.fetch_token(span.begin);
#pragma unroll 1
    for (int t = span.begin; t < span.end + kC; t += kC) {   // t: the chunk that it works out
      const float2 next = p.fetch_token(t + kC);
      cp_async_wait<1>();
      __syncwarp();
      if (t < span.end) p.work_out(t, token);
      token = next;
      meet();   // the others begin with chunk t, and are through with the one before
      p.fetch(t + 2 * kC);
    }
    return;
  }
  const Consumer<KT> w{s, m, span, head, first, warp * 16, lane};
  // Of the head in states of sequences or slots, worked out where it is needed: registers are few.
  const auto place = [&](int64_t i) { return (i * int(s.value_heads) + opaque(head)) * s.keys * s.values; };
  Columns<KT> c;
  w.load_state(c, s.state && span.valid ? s.state + place(sequence) : nullptr, span.valid ? 0.f : not_a_number());
  meet();
#pragma unroll 1
  for (int t = span.begin; t < span.end; t += kC) {
    const int done = t - span.begin;
    if (s.kept && span.valid && done % kGatedDeltaKeep == 0)
      w.store_state(c, s.kept + place(span.slot + done / kGatedDeltaKeep));
    w.advance(c, t);
    meet();
  }
  if (s.state_out) w.store_state(c, s.state_out + place(sequence));
}

template <int KT> int walk(const GatedDeltaRule& s, void* stream) {
  static_assert(sizeof(Memory<KT>) <= 99 * 1024);
  const int64_t blocks = (s.values + kColumnsOfBlock - 1) / kColumnsOfBlock, all = s.sequences * s.value_heads * blocks;
  if (all > kLongest) return cudaErrorInvalidValue;
  const dim3 grid = unsigned(all), block(kBlockThreads);
  return launch<gated_delta_rule_chunks_kernel<KT>>(grid, block, sizeof(Memory<KT>), stream, s, int(blocks));
}

}  // namespace

bool gated_delta_rule_chunks_fit(const GatedDeltaRule& s) {
  const auto fits = [](const View& x) { return x.type == DType::bf16 && vectorisable(x, kUnit, 3); };
  return (!s.g || s.one_decay) && s.keys % kUnit == 0 && s.values % kUnit == 0 && s.keys <= 128 && fits(s.q) &&
         fits(s.k) && fits(s.v) && fits(s.y);
}

int gated_delta_rule_chunks_cuda(const GatedDeltaRule& s, void* stream) {
  return s.keys <= 64 ? walk<4>(s, stream) : walk<8>(s, stream);
}

}  // namespace pyseq
