// The fused form, for x, B and C in bfloat16: a block walks the chunks of a segment for up to 8 tiles of 32 rows of the
// state, those of 4 heads of 64. Its warps compute the scores C B^T of a chunk together; each has its tile of S in
// registers, in float32, laid out as mma accumulates it, which is also how it takes S^T as its operand B.
//
// What is computed on the way to y, S and scores with their decay, is rounded to tf32 as an operand: bfloat16 would let
// it lose as much as rounding y does. What goes into S, w x, is the sum of three numbers of bfloat16. P and N are
// multiples of 8, N at most 128, and rows begin at 16 bytes; all else is left to the sequential form.
#include "ssd/chunk_output.cuh"

namespace pyseq {
namespace {

constexpr int kMostWarps = 8;

struct Plan {
  int tiles, blocks;   // tiles of a head, blocks of a group
};

template <int N>
__device__ __forceinline__ void output(const State<N>& S, const Chunk<N>& c, int stage, int t, int tokens) {
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    Output y{};
    Gate z{};
    from_state(y, S, c, h);
    if (c.s.z) load_gate(z, c, h, t, tokens);
    if (h == 0) __syncthreads();   // the scores are there
    from_tokens(y, c, h, stage);
    store_rows(y, z, c, h, stage, t, tokens);
  }
}

template <int N, bool kOutput>
__global__ void __launch_bounds__(32 * kMostWarps, 1) ssd_chunk_kernel(Ssd s, Plan p, Segments g) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int groups = int(s.groups), heads = int(s.heads) / groups, segments = kOutput ? g.splits : g.splits - 1;
  int unit = int(blockIdx.x) / p.blocks;
  const int tile = int(blockIdx.x) % p.blocks * warps + warp, group = unit % groups;
  unit /= groups;
  const int segment = unit % segments, sequence = unit / segments, first = tile % p.tiles * kRows;
  const int rows = tile < heads * p.tiles ? min(kRows, int(s.width) - first) : 0;   // none: the warp only helps
  unsigned char* const memory = dynamic_smem<unsigned char>();
  const int own_at = opaque(Place<N>::kOwn + warp * Place<N>::kEach);   // kept, rather than what it comes from
  const Chunk<N> c{s, memory, memory + own_at, lane, lane / 4, lane % 4};
  const int head = group * heads + (rows ? tile / p.tiles : 0);
  const Span span = span_of(s, sequence, segment, g.splits);
  const float A = span.valid ? s.A[head] : not_a_number();
  const int row = s.cu_seqlens ? 0 : sequence;
  if (lane == 0) c.at() = Tile{sequence, segment, span.end, row, head, group, first, rows, A, 0.f, {}};
  __syncwarp();
  if (s.D && lane < rows) c.at().D[lane] = s.D[head * s.D_width + (s.D_width > 1 ? first + lane : 0)];
  __syncwarp();
  // Places of the head's state: of the sequence, of the segment.
  const auto states = [&] { return (c.at().sequence * s.heads + c.at().head) * s.width * s.states; };
  const auto own = [&] { return (int64_t(c.at().sequence) * g.splits + c.at().segment) * s.heads + c.at().head; };
  State<N> S;
  const float* const given = s.state && span.valid ? s.state + states() : nullptr;
  const float* const between = kOutput ? g.states + own() * s.width * s.states : nullptr;
  load_state(S, segment == 0 ? given : between, c, span.valid ? 0.f : not_a_number());
  unsigned dt[2] = {};
  const auto fetch = [&](int t, int stage) {
    c.fetch_states(s.B, c.B(stage), t, c.at().end - t);
    c.fetch_rows(c.x(stage), t, c.at().end - t);
  };
  if (span.begin < span.end) {
    fetch(span.begin, span.begin / kQ % 2);
    if (kOutput) c.fetch_states(s.C, c.C(), span.begin, span.end - span.begin);
    c.load_dt(dt, span.begin, span.end - span.begin);
  }
#pragma unroll 1
  for (int t = span.begin;; t += kQ) {
    const int tokens = c.at().end - t, next = t + kQ, stage = t / kQ % 2;
    if (tokens <= 0) break;
    const bool more = tokens > kQ;
    cp_async_wait_all();
    __syncthreads();   // the chunk is there, and the one before has been used
    if (more) fetch(next, stage ^ 1);
    float delta[2];
    c.convert_dt(delta, dt, tokens);
    sum_steps(c.steps(), delta, c.at().A, lane);
    if (more) c.load_dt(dt, next, tokens - kQ);
    __syncwarp();
    if constexpr (kOutput) {
      c.compute_scores(stage);
      output(S, c, stage, t, tokens);
      __syncthreads();   // C has been read
      if (more) c.fetch_states(s.C, c.C(), next, tokens - kQ);
    } else {
      if (lane == 0) c.at().sum += c.L(kQ - 1).high + c.L(kQ - 1).low;
    }
    advance(S, c, stage);
  }
  if constexpr (kOutput) {
    if (s.state_out && c.at().segment + 1 == g.splits) store_state(s.state_out + states(), S, c);
  } else {
    store_state(g.states + own() * s.width * s.states, S, c);
    if (lane == 0 && c.at().first == 0 && c.at().rows > 0) g.decays[own()] = c.at().sum;
  }
}

static_assert(Place<128>::bytes(kMostWarps / 2) <= 99 * 1024 && Place<128>::bytes(kMostWarps) <= 163 * 1024);

template <int N, bool kOutput> int walk(const Ssd& s, const Segments& g, void* stream) {
  const int64_t tiles = (s.width + kRows - 1) / kRows, of_group = s.heads / s.groups * tiles;
  const bool most = of_group > kMostWarps / 2 && size_t(Place<N>::bytes(kMostWarps)) <= shared_limit();
  const int warps = most ? kMostWarps : kMostWarps / 2;   // 99 KB, those of sm_120, hold half of them
  const Plan p{int(tiles), int((of_group + warps - 1) / warps)};
  const int64_t blocks = s.sequences * (kOutput ? g.splits : g.splits - 1) * s.groups * p.blocks;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const dim3 grid = unsigned(blocks), block = unsigned(32 * warps);
  return launch<ssd_chunk_kernel<N, kOutput>>(grid, block, Place<N>::bytes(warps), stream, s, p, g);
}

}  // namespace

bool ssd_chunks_fit(const Ssd& s) {
  const auto fits = [](const View& x) { return !x || (x.type == DType::bf16 && vectorisable(x, kUnit, 3)); };
  const bool y = s.y.type == DType::f32 ? vectorisable(s.y, 2, 3) : fits(s.y);
  return !s.exact && s.width % kUnit == 0 && s.states % kUnit == 0 && s.states <= 128 && fits(s.x) && fits(s.B) &&
         fits(s.C) && fits(s.z) && y && reinterpret_cast<uintptr_t>(s.state) % 8 == 0;
}

int64_t ssd_chunk_units(const Ssd& s) {
  const int64_t of_group = s.heads / s.groups * ((s.width + kRows - 1) / kRows);
  return s.sequences * s.groups * ((of_group + kMostWarps - 1) / kMostWarps);
}

int ssd_chunk_cuda(const Ssd& s, const Segments& g, bool output, void* stream) {
  if (s.states <= 64) return output ? walk<64, true>(s, g, stream) : walk<64, false>(s, g, stream);
  return output ? walk<128, true>(s, g, stream) : walk<128, false>(s, g, stream);
}

}  // namespace pyseq
