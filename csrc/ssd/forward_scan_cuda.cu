// The sequential form, token by token in the arithmetic of the step: a warp walks a tile of rows and states of one head
// through a segment of a sequence, its part of S in registers.
#include "cuda/reduce.cuh"
#include "ssd/tokens.cuh"

namespace pyseq {
namespace {

constexpr int kAtOnce = 2;   // tokens unrolled

// How blocks are dealt out: warp w of block i of a group has its tile 4 i + w.
struct Plan {
  int tiles, blocks;   // tiles of a head, blocks of a group
  int slices;
  Layout layout;
};

template <int L, int F> Plan plan(const Ssd& s) {
  const int64_t tiles = (s.width + kTileRows<L> - 1) / kTileRows<L>, of_group = s.heads / s.groups * tiles;
  return {int(tiles), int((of_group + kWarps - 1) / kWarps),
          int((s.states + kTileStates<L, F> - 1) / kTileStates<L, F>), layout<L, F>(s)};
}

// From and to a matrix [P, N]; `otherwise` where there is none, zeros beyond its edges.
__device__ __forceinline__ bool wide(const float* p, int count) {
  return count >= 4 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <int L, int F>
__device__ __forceinline__ void load_states(States<F>& S, const float* from, const Tokens<L, F>& t, int slice,
                                            float otherwise) {
  const int row = t.lane / L * 4, state = slice * kTileStates<L, F> + t.lane % L * 4, N = int(t.s.states);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const int n = state + f * 4 * L, count = row + r < t.rows ? within(4, N - n) : 0;
      const float* const p = from ? from + int64_t(t.first + row + r) * N + n : nullptr;
      const bool whole = p && wide(p, count);
      const Vec<4> x = whole ? load_vec<4>(p) : Vec<4>{};
#pragma unroll
      for (int e = 0; e < 4; ++e) S.v[r][4 * f + e] = whole ? x[e] : e >= count ? 0.f : p ? p[e] : otherwise;
    }
  }
}
template <int L, int F>
__device__ __forceinline__ void store_states(float* to, const States<F>& S, const Tokens<L, F>& t, int slice) {
  const int row = t.lane / L * 4, state = slice * kTileStates<L, F> + t.lane % L * 4, N = int(t.s.states);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const int n = state + f * 4 * L, count = row + r < t.rows ? within(4, N - n) : 0;
      float* const p = to + int64_t(t.first + row + r) * N + n;
      const Vec<4> x{S.v[r][4 * f], S.v[r][4 * f + 1], S.v[r][4 * f + 2], S.v[r][4 * f + 3]};
      if (wide(p, count)) {
        store_vec<4>(p, x);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < count) p[e] = x[e];
      }
    }
  }
}

// Tokens [i, i + K) of those brought in.
template <int L, int F, bool kOutput, int K>
__device__ __forceinline__ void scan(States<F>& S, const Tokens<L, F>& t, int i) {
  using At = Place<L, F>;
  const int row = t.lane / L * 4, state = t.lane % L * 4;
  float y[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float delta = t.warp(At::kSteps)[2 * (i + k)], a = t.warp(At::kSteps)[2 * (i + k) + 1];
    Vec<4> dx = load_vec<4>(t.warp(At::kX) + (i + k) * kTileRows<L> + row);
#pragma unroll
    for (int r = 0; r < 4; ++r) dx[r] *= delta;
    Vec<4 * F> B{}, C{};
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const int at = (i + k) * kTileStates<L, F> + f * 4 * L + state;
      const Vec<4> b = load_vec<4>(t.block(At::kB) + at), c = kOutput ? load_vec<4>(t.block(At::kC) + at) : Vec<4>{};
#pragma unroll
      for (int e = 0; e < 4; ++e) B[4 * f + e] = b[e], C[4 * f + e] = c[e];
    }
    const Vec<4> part = advance<kOutput, F>(S, a, dx, B, C);
    if constexpr (kOutput) y[k] = sum_over_lanes<L>(part, t.lane);
  }
  if constexpr (kOutput) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (t.lane % L < 4) t.warp(At::kY)[(i + k) * kTileRows<L> + row + sum_row(t.lane)] = y[k];
  }
}

template <int L, int F, bool kOutput>
__global__ void __launch_bounds__(kThreads, F < 4 ? 3 : 2) ssd_scan_kernel(Ssd s, Plan p, Segments g) {
  const int warp = threadIdx.x / 32, block = blockIdx.x % p.blocks;
  const int groups = int(s.groups), heads = int(s.heads) / groups;
  int unit = int(blockIdx.x) / p.blocks;
  const int group = unit % groups, segments = kOutput ? g.splits : g.splits - 1;
  unit /= groups;
  const int segment = unit % segments, sequence = unit / segments;
  const int tile = block * kWarps + warp, head = group * heads + min(tile / p.tiles, heads - 1);
  const int first = tile % p.tiles * kTileRows<L>;
  const int rows = tile < heads * p.tiles ? min(kTileRows<L>, int(s.width) - first) : 0;
  const Span span = span_of(s, sequence, segment, g.splits);
  unsigned char* const memory = dynamic_smem<unsigned char>();
  const Tokens<L, F> tokens{s, p.layout, memory, memory + p.layout.shared + warp * p.layout.own, span.end,
                            int(threadIdx.x % 32), s.cu_seqlens ? 0 : sequence, head, group, first, rows};
  const float A = span.valid ? s.A[head] : not_a_number(), otherwise = span.valid ? 0.f : not_a_number();
  const int64_t size = s.width * s.states, states = (int64_t(sequence) * s.heads + head) * size;
  float* const between = g.states + ((int64_t(sequence) * g.splits + segment) * s.heads + head) * size;
  float sum = 0.f;
#pragma unroll 1
  for (int slice = 0; slice < p.slices; ++slice) {
    States<F> S;
    const float* const given = s.state && span.valid ? s.state + states : nullptr;
    load_states(S, segment == 0 ? given : kOutput ? between : nullptr, tokens, slice, segment == 0 ? otherwise : 0.f);
    float dt = 0.f;
    if (span.begin < span.end) {
      tokens.template fetch<kOutput>(span.begin, slice);
      dt = tokens.dt(span.begin);
    }
#pragma unroll 1
    for (int t = span.begin; t < span.end; t += kTokens) {
      cp_async_wait_all();
      __syncthreads();   // what was copied is there, and the tokens before have been used
      tokens.convert_states(p.layout.B, Place<L, F>::kB);
      if (kOutput) tokens.convert_states(p.layout.C, Place<L, F>::kC);
      tokens.convert_rows();
      const float l = tokens.convert_steps(dt, A, t);
      if (!kOutput && slice == 0) sum += l;
      __syncthreads();
      const bool more = t + kTokens < span.end, gated = kOutput && s.z;
      if (more) {
        tokens.fetch_states(p.layout.B, t + kTokens, slice);
        if (kOutput) tokens.fetch_states(p.layout.C, t + kTokens, slice);
        tokens.fetch_rows(p.layout.x, t + kTokens);
        dt = tokens.dt(t + kTokens);
      }
      const int count = tokens.left(t);
      int i = 0;
#pragma unroll 1
      for (; i + kAtOnce <= count; i += kAtOnce) scan<L, F, kOutput, kAtOnce>(S, tokens, i);
      if (i < count) scan<L, F, kOutput, 1>(S, tokens, i);
      __syncwarp();
      if (kOutput) tokens.store_rows(g.partial, t, slice, slice + 1 == p.slices);
      if (gated && more) {
        __syncwarp();   // z has been read
        tokens.fetch_rows(p.layout.z, t + kTokens);
      }
    }
    __syncthreads();   // the next slice begins to copy
    if (!kOutput) store_states(between, S, tokens, slice);
    else if (s.state_out && segment + 1 == g.splits) store_states(s.state_out + states, S, tokens, slice);
  }
  if constexpr (!kOutput) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0 && rows > 0 && first == 0)
      g.decays[(int64_t(sequence) * g.splits + segment) * s.heads + head] = sum;
  }
}

template <int L, int F, bool kOutput> int scan_all(const Ssd& s, const Segments& g, void* stream) {
  const Plan p = plan<L, F>(s);
  const int64_t blocks = s.sequences * (kOutput ? g.splits : g.splits - 1) * s.groups * p.blocks;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const size_t bytes = size_t(p.layout.shared) + size_t(kWarps) * p.layout.own;
  return launch<ssd_scan_kernel<L, F, kOutput>>(dim3(unsigned(blocks)), dim3(kThreads), bytes, stream, s, p, g);
}

}  // namespace

int64_t ssd_scan_units(const Ssd& s) {
  return for_states(s.states, [&]<int L, int F>() { return s.sequences * s.groups * plan<L, F>(s).blocks; });
}

int64_t ssd_scan_slices(const Ssd& s) {
  return for_states(s.states, [&]<int L, int F>() { return int64_t(plan<L, F>(s).slices); });
}

int ssd_scan_cuda(const Ssd& s, const Segments& g, bool output, void* stream) {
  return for_states(s.states, [&]<int L, int F>() {
    return output ? scan_all<L, F, true>(s, g, stream) : scan_all<L, F, false>(s, g, stream);
  });
}

}  // namespace pyseq
