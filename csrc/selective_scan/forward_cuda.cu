// A warp walks a tile of channels and states through a row, its h in registers. Where rows and channels are too few to
// fill a GPU, a row is cut into chunks, in three launches: every chunk but the last from zeros, for the state it ends with;
// the states that the chunks begin with, one after another, since all of a chunk multiplies h by exp(A sum delta); every
// chunk from there.
#include "cuda/device.cuh"
#include "selective_scan/tokens.cuh"

namespace pyseq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct Plan {
  int64_t tiles, slices;    // of a row; of the states
  int64_t splits, chunk;    // chunks of a row, and their tokens
  float* states;            // [B, splits, D, N]: of slices that wait, and where chunks end and begin
  float* steps;             // [B, splits, D]: sum of delta over a chunk
  Layout layout;
  Wide wide;
};

// Enough warps are 2112, four for each quarter of the 132 multiprocessors of an H200. Splitting computes every exponential
// twice: it has to bring four times as many warps, and chunks stay 256 tokens long at least.
int64_t splits_of(int64_t warps, int64_t time) {
  const int64_t wanted = warps == 0 || warps >= 528 ? 1 : (2112 + warps - 1) / warps, most = time / 256;
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

template <int L> Plan plan(const SelectiveScan& s) {
  Plan p{};
  p.tiles = s.groups * tiles_of_group(s.dim, s.groups, kTileChannels<L>);
  p.slices = (s.states + kTileStates<L> - 1) / kTileStates<L>;
  const int64_t splits = splits_of(s.batch * p.tiles, s.time);
  p.chunk = (s.time + splits * kChunk - 1) / (splits * kChunk) * kChunk;
  p.splits = s.time ? (s.time + p.chunk - 1) / p.chunk : 1;
  p.layout = layout<L>(s);
  p.wide = wide(s);
  return p;
}

// The states of a sequence enter where it begins and leave where it ends.
struct Sequences {
  const SelectiveScan& s;
  int64_t last;      // one past the last sequence of the row
  float otherwise;   // zeros, or NaN

  __device__ __forceinline__ explicit Sequences(const SelectiveScan& s, int64_t row)
      : s(s), last(s.sequence_of ? s.sequences : row + 1),
        otherwise(s.sequence_of && s.sequence_of[s.time] < 0 ? __int_as_float(0x7fffffff) : 0.f) {}

  __device__ __forceinline__ bool valid() const { return otherwise == 0.f; }
  __device__ __forceinline__ void enter(States& h, int64_t sequence, const Corner& at) const {
    const float* const from = s.state && valid() && sequence < last ? s.state + sequence * s.dim * s.states : nullptr;
    load_states(h, from, at, s.states, otherwise);
  }
  // From the end of sequence `from` to the start of sequence `to`: those between are empty and keep their states.
  __device__ __forceinline__ void turn(States& h, int64_t from, int64_t to, const Corner& at) const {
    for (; from < to; ++from) {
      if (s.state_out) store_states(s.state_out + from * s.dim * s.states, h, at, s.states);
      if (from + 1 < last) enter(h, from + 1, at);
    }
  }
};

// Tokens [t, t + K) of a tile.
template <int L, bool kOutput, int K>
__device__ __forceinline__ void scan(States& h, const States& A, const Tokens<L>& tokens, int t, bool add) {
  constexpr int kN = kTileStates<L>, kD = kTileChannels<L>;
  const int lane = tokens.lane, state = lane % L * 4, channel = lane / L * 4;
  const Layout& at = tokens.at;
  Vec<4> y[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Vec<4> delta = load_vec<4>(tokens.floats(at.delta) + (t + k) * kD + channel);
    const Vec<4> du = load_vec<4>(tokens.floats(at.du) + (t + k) * kD + channel);
    const Vec<4> B = load_vec<4>(tokens.floats(at.B) + (t + k) * kN + state);
    const Vec<4> C = kOutput ? load_vec<4>(tokens.floats(at.C) + (t + k) * kN + state) : Vec<4>{};
    y[k] = advance<kOutput>(h, A, delta, du, B, C);
    if constexpr (kOutput) sum_over_states<L>(y[k], lane);
  }
  if constexpr (kOutput) {
    if constexpr (!kSlices<L>) __syncwarp();   // all lanes have read du of these tokens: y takes its place
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float* const to = tokens.floats(at.y) + (t + k) * kD + channel + sums_from<L>(lane);
      if (L <= 4 || lane % L < 4) {
#pragma unroll
        for (int i = 0; i < kSums<L>; ++i) to[i] = add ? to[i] + y[k][i] : y[k][i];
      }
    }
  }
}

template <int L, bool kOutput>
__global__ void __launch_bounds__(kThreads, 4) selective_scan_forward_kernel(SelectiveScan s, Plan p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + warp, chunks = kOutput ? p.splits : p.splits - 1;
  if (unit >= s.batch * chunks * p.tiles) return;
  const int64_t row = unit / p.tiles / chunks, chunk = unit / p.tiles % chunks;
  const int64_t begin = chunk * p.chunk, end = min(begin + p.chunk, s.time);
  const Tile tile = tile_at<L>(s.dim, s.groups, unit % p.tiles);
  const Tokens<L> tokens(s, p.layout, p.wide, dynamic_smem<unsigned char>() + warp * p.layout.bytes, tile, row, end, lane);
  const Sequences sequences(s, row);
  float* const mine = p.states ? p.states + (row * p.splits + chunk) * s.dim * s.states : nullptr;

  const View channels_D{const_cast<float*>(s.D), DType::f32, {}}, channels_bias{const_cast<float*>(s.dt_bias), DType::f32, {}};
  const Vec<4> D = s.D ? load_vec<4>(channels_D, tokens.channel, false, tokens.channels) : Vec<4>{};
  const Vec<4> bias = s.dt_bias ? load_vec<4>(channels_bias, tokens.channel, false, tokens.channels) : Vec<4>{};
  Vec<4> steps{};
  States h, A;
  int64_t sequence = s.sequence_of ? 0 : row;
  if (s.sequence_of && sequences.valid() && chunk) sequence = s.sequence_of[begin - 1];
  int64_t next = s.sequence_of && sequences.valid() && !chunk ? s.sequence_of[0] : sequence;
  for (int64_t slice = 0; slice < p.slices; ++slice) {
    const Corner at = corner_of<L>(tile, lane, slice, s.states);
    load_A(A, s.A, at, s.states);
    if (chunk && kOutput) load_states(h, mine, at, s.states, 0.f);
    else if (chunk) load_states(h, nullptr, at, s.states, 0.f);
    else sequences.enter(h, sequence, at), sequences.turn(h, sequence, next, at);
    if (p.slices > 1) store_states(mine, h, at, s.states);
  }
  sequence = next;

  const auto fetch_rows = [&](int64_t t, int stage) {
    tokens.fetch_rows(s.dt, p.wide.dt, tokens.raw(p.layout.raw_dt, s.dt), t);
    tokens.fetch_rows(s.u, p.wide.u, tokens.raw(p.layout.raw_u, s.u, stage), t);
    if (kOutput && s.z) tokens.fetch_rows(s.z, p.wide.z, tokens.raw(p.layout.raw_z, s.z, stage), t);
  };
  const auto fetch_shared = [&](int64_t t, int64_t slice) {
    tokens.fetch_shared(s.B, p.wide.B, tokens.raw(p.layout.raw_B, s.B), t, slice);
    if (kOutput) tokens.fetch_shared(s.C, p.wide.C, tokens.raw(p.layout.raw_C, s.C), t, slice);
  };
  fetch_rows(begin, 0);
  fetch_shared(begin, 0);
  int stage = 0;
  for (int64_t t = begin; t < end; t += kTokens<L>, stage ^= 1) {
    const bool inside = s.sequence_of && lane < kTokens<L> && t + lane < end && t + lane > 0;
    const unsigned starts = __ballot_sync(~0u, inside && s.sequence_of[t + lane] != s.sequence_of[t + lane - 1]);
    const int64_t before = sequence;
    for (int64_t slice = 0; slice < p.slices; ++slice) {
      __syncwarp();   // the tile before has been read
      if (slice == 0) tokens.convert_rows(t, stage, bias, steps);
      tokens.convert_shared(s.B, p.layout.raw_B, p.layout.B, t, slice);
      if (kOutput) tokens.convert_shared(s.C, p.layout.raw_C, p.layout.C, t, slice);
      if (slice + 1 < p.slices) fetch_shared(t, slice + 1);
      else fetch_shared(t + kTokens<L>, 0), fetch_rows(t + kTokens<L>, stage ^ 1);
      __syncwarp();
      const Corner at = corner_of<L>(tile, lane, slice, s.states);
      if (p.slices > 1) load_A(A, s.A, at, s.states), load_states(h, mine, at, s.states, 0.f);
      sequence = before;
      for (int i = 0; i < kTokens<L>;) {
        if (starts >> i & 1) {
          const int64_t to = s.sequence_of[t + i];
          if (kOutput) sequences.turn(h, sequence, to, at);
          else sequences.enter(h, to, at);
          sequence = to;
        }
        if (kOutput && i == 0 && s.checkpoints && t > 0 && t % kChunk == 0)
          store_states(s.checkpoints + (row * checkpoints(s.time) + t / kChunk - 1) * s.dim * s.states, h, at, s.states);
        const unsigned later = starts >> i >> 1;
        const int until = later ? i + __ffs(int(later)) : kTokens<L>;
        for (; i + 4 <= until; i += 4) scan<L, kOutput, 4>(h, A, tokens, i, slice > 0);
        for (; i < until; ++i) scan<L, kOutput, 1>(h, A, tokens, i, slice > 0);
      }
      if (p.slices > 1) store_states(mine, h, at, s.states);
    }
    __syncwarp();
    if (kOutput) tokens.store_rows(t, stage, D);
  }

  for (int64_t slice = 0; slice < p.slices; ++slice) {
    const Corner at = corner_of<L>(tile, lane, slice, s.states);
    if (p.slices > 1) load_states(h, mine, at, s.states, 0.f);
    if (!kOutput) store_states(mine, h, at, s.states);
    else if (chunk + 1 == p.splits) sequences.turn(h, sequence, sequences.last, at);
  }
  if (!kOutput) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int d = 32 / L; d < 32; d *= 2) steps[c] += __shfl_xor_sync(~0u, steps[c], d);
      if (tokens.first == 0 && c < tokens.channels) p.steps[(row * p.splits + chunk) * s.dim + tokens.channel + c] = steps[c];
    }
  }
}

// A thread per channel and state of a row: where chunks end becomes where they begin.
__global__ void __launch_bounds__(kThreads) selective_scan_carry_kernel(SelectiveScan s, Plan p) {
  const int64_t size = s.dim * s.states, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.batch * size) return;
  const int64_t row = i / size, state = i % size;
  const float A = s.A[state] * kLog2e;
  float* at = p.states + row * p.splits * size + state;
  float h = *at;
  for (int64_t chunk = 1; chunk < p.splits; ++chunk) {
    at += size;
    const float end = chunk + 1 < p.splits ? *at : 0.f;
    *at = h;
    const int64_t first = chunk * p.chunk, last = min(first + p.chunk, s.time) - 1;
    const bool starts = s.sequence_of && s.sequence_of[first - 1] != s.sequence_of[last];
    // Half the exponent at a time: a large factor of a small state, or the other way round, does not overflow.
    const float root = ex2(0.5f * A * p.steps[(row * p.splits + chunk) * s.dim + state / s.states]);
    h = starts || h == 0.f ? end : fmaf(root, root * h, end);
  }
}

template <int L> int forward(const SelectiveScan& s, void* stream) {
  Plan p = plan<L>(s);
  if (p.splits > 1 || p.slices > 1) p.states = s.workspace;
  if (p.splits > 1) p.steps = s.workspace + s.batch * p.splits * s.dim * s.states;
  const auto grid = [&](int64_t units, int64_t per_block) { return dim3(unsigned((units + per_block - 1) / per_block)); };
  const size_t bytes = size_t(kWarps) * p.layout.bytes;
  if (p.splits > 1) {
    const int64_t units = s.batch * (p.splits - 1) * p.tiles;
    if (const int error = launch<selective_scan_forward_kernel<L, false>>(grid(units, kWarps), dim3(kThreads), bytes, stream, s, p))
      return error;
    const dim3 carry = grid(s.batch * s.dim * s.states, kThreads);
    if (const int error = launch<selective_scan_carry_kernel>(carry, dim3(kThreads), 0, stream, s, p)) return error;
  }
  const dim3 all = grid(s.batch * p.splits * p.tiles, kWarps);
  return launch<selective_scan_forward_kernel<L, true>>(all, dim3(kThreads), bytes, stream, s, p);
}

// f<L>() for the L that the states need.
template <class F> auto for_states(int64_t states, const F& f) {
  switch (lanes_per_channel(states)) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 4: return f.template operator()<4>();
    case 8: return f.template operator()<8>();
    default: return f.template operator()<16>();
  }
}

}  // namespace

int64_t selective_scan_forward_workspace(const SelectiveScan& s) {
  return for_states(s.states, [&]<int L>() {
    const Plan p = plan<L>(s);
    if (p.splits == 1 && p.slices == 1) return int64_t(0);
    return s.batch * p.splits * s.dim * (s.states + 1);
  });
}

int selective_scan_forward_cuda(const SelectiveScan& s, void* stream) {
  if (s.batch == 0 || s.dim == 0) return 0;
  return for_states(s.states, [&]<int L>() { return forward<L>(s, stream); });
}

}  // namespace pyseq
