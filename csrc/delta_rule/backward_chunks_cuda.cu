// The gradient: a block takes a head of a sequence and some columns of its state at a time, the last tokens first.
#include "delta_rule/backward_gradient.cuh"
#include "delta_rule/backward_recompute.cuh"

namespace pyseq::delta_rule {
namespace {

// What w.unit is. No span is begun.
__device__ __forceinline__ void find(Where& w, const DeltaRule& s, const Plan& p) {
  w.part = w.unit % p.parts;
  w.head = w.unit / p.parts % s.heads;
  const int64_t sequence = w.unit / p.parts / s.heads;
  w.state = (sequence * s.heads + w.head) * s.keys * s.values;
  w.begin = 0;
  if (s.cu_seqlens) {
    w.row = 0;
    w.first = s.cu_seqlens[sequence];
    w.time = s.cu_seqlens[sequence + 1] - w.first;
    w.slot = w.first / kDeltaKeep + sequence;
  } else {
    w.row = sequence;
    w.first = 0;
    w.time = s.time;
    w.slot = sequence * ((s.time + kDeltaKeep - 1) / kDeltaKeep);
  }
  w.span = (w.time + kDeltaKeep - 1) / kDeltaKeep;
}

template <class Policy, class S>
__global__ void __launch_bounds__(S::kThreads, S::kWarps == 4 ? 2 : 1) delta_rule_backward_kernel(DeltaRule s, Plan p) {
  if (invalid(s)) return;
  Memory<S>& m = *dynamic_smem<Memory<S>>();
  Span<Policy, S> at{s, p, m, int(threadIdx.x % 32), int(threadIdx.x / 32), 0};
  // A warp's own part of G: calls f(tile, n, where it is).
  const auto own = [&](auto f) {
#pragma unroll 1
    for (int i = 0; i < S::kKeyTiles * S::kValueTiles; ++i) {
      const int tile = at.tile(i / S::kValueTiles), n = i % S::kValueTiles;
      f(tile, n, m.G[tile] + 16 * n * kStride);
    }
    __syncwarp();
  };
  Where& w = m.where;
  const bool leads = threadIdx.x == 0;
  if (leads) w.unit = blockIdx.x;
  __syncthreads();
#pragma unroll 1
  while (w.unit < p.units) {
    if (leads) find(w, s, p);
    __syncthreads();
    own([&](int tile, int n, float* to) {
      const float* const from = s.dstate_out ? s.dstate_out + w.state : nullptr;
      store_rows(to, kStride, at.load_state(from, tile, n), at.lane);
    });
#pragma unroll 1
    while (w.span > 0) {
      __syncthreads();   // all have asked
      if (leads) {
        --w.span;
        w.count = int(min(w.time - w.span * kDeltaKeep, kDeltaKeep));
      }
      __syncthreads();
      Recompute<Policy, S>{at}.run();
      Gradient<Policy, S>{{at}}.run();
    }
    if (s.dstate) {
      own([&](int tile, int n, const float* from) {
        at.store_state(s.dstate + w.state, load_rows(from, kStride, at.lane), tile, n);
      });
    }
    __syncthreads();   // `w` has been read
    if (leads) w.unit += gridDim.x;
    __syncthreads();
  }
}

template <class Policy, class S> int launch_all(const DeltaRule& s, void* stream) {
  const Plan p(s);
  constexpr size_t kBytes = sizeof(Memory<S>);
  static_assert(kBytes <= 99 * 1024);
  const dim3 grid(unsigned(p.blocks));
  return launch<delta_rule_backward_kernel<Policy, S>>(grid, dim3(S::kThreads), kBytes, stream, s, p);
}

}  // namespace

// Parts of 8 bits have a kernel for heads of 64 keys, the size of RWKV-7's.
int delta_rule_chunks_cuda(const DeltaRule& s, void* stream) {
  bool half = s.keys > 32 && s.keys <= 64;   // and what is multiplied is bfloat16
  for (const View* x : {&s.q, &s.k, &s.v, &s.a, &s.b, &s.dy}) half = half && (!*x || x->type == DType::bf16);
  if (half) return launch_all<Bf16, Narrow>(s, stream);
  return for_keys(s.keys, [&](auto shape) { return launch_all<Tf32, decltype(shape)>(s, stream); });
}

}  // namespace pyseq::delta_rule
