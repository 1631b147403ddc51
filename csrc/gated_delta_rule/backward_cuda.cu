// The gradient, in float32 throughout. A block has some columns of the state of one head. It walks the spans of 64
// tokens of a sequence from the last to the first, with the gradient of the state: for each span forward once, from the
// state that the forward kept, for the e of its chunks; then from the last chunk to the first. The state before a chunk
// comes from the kept one and the e of the chunks between.
#include "gated_delta_rule/gradients.cuh"

namespace pyseq {
namespace {

constexpr int kSpan = int(kGatedDeltaKeep);

struct Walk : Gradients {
  __device__ __forceinline__ float* e_at(int t, int column) const {
    return partial.e + token(t) * s.values + first + column;
  }
  __device__ __forceinline__ void load_e(int t) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kC * at.columns; i += kChunkThreads) {
      const int row = i / at.columns, column = i % at.columns;
      const bool there = row < left(t) && first + column < int(s.values);
      memory[at.E + row * at.column_stride + column] = there ? *e_at(t + row, column) : 0.f;
    }
  }
  // V - Kr H into D; M, by the last warp.
  __device__ __forceinline__ void values_missing() const {
#pragma unroll 1
    for (int i = warp; i < at.columns / 16; i += kChunkWarps) {
      Result d{};
      add_product<false, false>(d, keys(at.K), state(at.H, 0, 16 * i), at.keys, lane);
      each(d, lane, [&](int row, int c, float x) { memory[at.D + row * at.column_stride + 16 * i + c] -= x; });
    }
    if (warp == kChunkWarps - 1) invert(false);
  }
  __device__ __forceinline__ void errors(int t) const {
#pragma unroll 1
    for (int i = warp; i < at.columns / 16; i += kChunkWarps) {
      Result d{};
      add_product<false, false>(d, small(at.M), rows(at.D, 16 * i), kC, lane);
      each(d, lane, [&](int row, int c, float x) {
        memory[at.E + row * at.column_stride + 16 * i + c] = x;
        if (row < left(t) && first + 16 * i + c < int(s.values)) *e_at(t + row, 16 * i + c) = x;
      });
    }
  }

  __device__ __forceinline__ void forward(int t, bool advance) const {
    stage_keys<false>(t);
    stage_columns(s.v, wide.v, t, at.D);
    __syncthreads();
    scores<false>();
    __syncthreads();
    factors<false>();
    __syncthreads();
    values_missing();
    __syncthreads();
    errors(t);
    __syncthreads();
    if (!advance) return;
    advance_state();
    __syncthreads();
  }
  __device__ __forceinline__ void replay(int t) const {
    stage_keys<false>(t);
    load_e(t);
    __syncthreads();
    factors<false>();
    __syncthreads();
    advance_state();
    __syncthreads();
  }
  __device__ __forceinline__ void backward(int t) const {
    stage_keys<true>(t);
    stage_columns(s.dy, wide.dy, t, at.O);
    load_e(t);
    __syncthreads();
    scores<true>();
    __syncthreads();
    factors<true>();
    __syncthreads();
    values_written();
    __syncthreads();
    values(t);
    __syncthreads();
    Keys d{};
    of_factors(d);
    of_scores();
    of_decay();
    __syncthreads();
    of_tokens(t);
    advance_gradient();
    __syncthreads();
    store_factors(d);
    __syncthreads();
    of_keys(t);
    __syncthreads();
  }
};

// Where cu_seqlens is not valid.
__device__ __forceinline__ void all_nan(const Gradients& c, float* dstate) {
  const float nan = not_a_number();
  const GatedDeltaRule& s = c.s;
  const int columns = min(c.at.columns, int(s.values) - c.first);
  for (int t = c.span.begin; t < c.span.end; ++t) {
    const int64_t row = c.offset + c.token(t);
    for (int i = int(threadIdx.x); i < int(s.keys); i += kChunkThreads) {
      c.partial.q[row * s.keys + i] = c.partial.k[row * s.keys + i] = nan;
      if (s.g && !s.one_decay) c.partial.g[row * s.keys + i] = nan;
    }
    for (int i = int(threadIdx.x); i < columns; i += kChunkThreads)
      store(s.dv, c.of_head(s.dv, c.head, t) + c.first + i, nan);
    if (threadIdx.x > 0) continue;
    c.partial.beta[row] = nan;
    if (s.g && s.one_decay) c.partial.g[row] = nan;
  }
  for (int i = int(threadIdx.x); dstate && i < int(s.keys) * columns; i += kChunkThreads)
    dstate[int64_t(i / columns) * s.values + c.first + i % columns] = nan;
}

__global__ void __launch_bounds__(kChunkThreads, 1)
gated_delta_rule_backward_kernel(GatedDeltaRule s, Layout at, Wide wide, Partials partial) {
  const int heads = int(s.value_heads), part = int(blockIdx.x) % at.parts, unit = int(blockIdx.x) / at.parts;
  const int head = unit % heads, sequence = unit / heads;
  const int64_t size = s.keys * s.values, rows = s.batch * s.time * heads;
  const Walk c{{{s, at, wide, dynamic_smem<float>(), span_of(s, sequence), head, part * at.columns,
                 int(threadIdx.x % 32), int(threadIdx.x / 32)}, partial, part * rows}};
  const Span& span = c.span;
  const int64_t of_sequence = (int64_t(sequence) * heads + head) * size;
  float* const dstate = s.dstate ? s.dstate + of_sequence : nullptr;
  if (!span.valid) return all_nan(c, dstate);
  c.load_state(at.G, s.dstate_out ? s.dstate_out + of_sequence : nullptr);
  const int spans = (span.end - span.begin + kSpan - 1) / kSpan;
#pragma unroll 1
  for (int n = spans - 1; n >= 0; --n) {
    const int begin = span.begin + n * kSpan, end = min(begin + kSpan, span.end);
    const float* const kept = s.kept + (int64_t(span.slot + n) * heads + head) * size;
    c.load_state(at.H, kept);
    for (int t = begin; t < end; t += kC) c.forward(t, t + kC < end);
#pragma unroll 1
    for (int t = begin + (end - begin - 1) / kC * kC; t >= begin; t -= kC) {
      if (t + kC < end) {
        c.load_state(at.H, kept);
        for (int before = begin; before < t; before += kC) c.replay(before);
      }
      c.backward(t);
    }
  }
  __syncthreads();
  if (!dstate) return;
  for (int i = int(threadIdx.x); i < int(s.keys) * at.columns; i += kChunkThreads) {
    const int key = i / at.columns, column = i % at.columns;
    if (c.first + column < int(s.values))
      dstate[int64_t(key) * s.values + c.first + column] = c.memory[at.G + key * at.column_stride + column];
  }
}

// Memory of each part in turn, in floats: the addresses, and the size of all.
int64_t divide(const GatedDeltaRule& s, Partials& p) {
  const int64_t rows = s.batch * s.time * s.value_heads, parts = layout(s).parts;
  int64_t used = 0;
  const auto take = [&](float*& to, int64_t count) {
    to = s.workspace + used;
    used += (count + 15) / 16 * 16;
  };
  take(p.q, parts * rows * s.keys);
  take(p.k, parts * rows * s.keys);
  take(p.g, s.g ? parts * rows * (s.one_decay ? 1 : s.keys) : 0);
  take(p.beta, parts * rows);
  take(p.e, rows * s.values);
  return used;
}

}  // namespace

int64_t gated_delta_rule_backward_workspace(const GatedDeltaRule& s) {
  Partials p;
  return divide(s, p);
}

int gated_delta_rule_backward_cuda(const GatedDeltaRule& s, void* stream) {
  if (s.sequences == 0 || s.value_heads == 0) return 0;
  const Layout at = layout(s);
  for (const int64_t size : {s.batch, s.time, s.value_heads, s.sequences, s.sequences * s.value_heads * at.parts})
    if (size > kLongest) return cudaErrorInvalidValue;
  Partials p;
  divide(s, p);
  const dim3 grid(unsigned(s.sequences * s.value_heads * at.parts));
  const size_t bytes = at.floats * sizeof(float);
  const dim3 block(kChunkThreads);
  const int error = launch<gated_delta_rule_backward_kernel>(grid, block, bytes, stream, s, at, wide(s), p);
  return error ? error : gated_delta_rule_reduce_cuda(s, p, at.parts, stream);
}

}  // namespace pyseq
