// A warp walks a tile of channels and states through a row, its h in registers. Where rows and channels are too few to
// fill a GPU, a row is cut into chunks, in three launches: every chunk but the last from zeros, for the state it ends with;
// the states that the chunks begin with, one after another, since all of a chunk multiplies h by exp(A sum delta); every
// chunk from there.
#include "cuda/device.cuh"
#include "selective_scan/whole.cuh"

namespace pyseq {
namespace {

template <int L> constexpr int kAtOnce = L == 4 || L == 8 ? 4 : 2;   // tokens unrolled: what 128 registers allow

// The states of a sequence enter where it begins and leave where it ends.
struct Sequences {
  const SelectiveScan& s;
  const Walk& walk;

  __device__ __forceinline__ bool valid() const { return !s.sequence_of || s.sequence_of[s.time] >= 0; }
  __device__ __forceinline__ int of(int t) const { return s.sequence_of && valid() ? s.sequence_of[t] : first(); }
  __device__ __forceinline__ int first() const { return s.sequence_of ? 0 : walk.row; }
  __device__ __forceinline__ int last() const { return s.sequence_of ? int(s.sequences) : walk.row + 1; }   // and one more

  __device__ __forceinline__ void enter(States& h, int sequence, const Corner& at) const {
    const bool given = s.state && valid() && sequence < last();
    const float* const from = given ? s.state + sequence * s.dim * s.states : nullptr;
    load_states(h, from, at, s.states, valid() ? 0.f : __int_as_float(0x7fffffff));
  }
  // From the end of sequence `from` to the start of sequence `to`: those between are empty and keep their states.
  __device__ __forceinline__ void turn(States& h, int from, int to, const Corner& at) const {
    for (; from < to; ++from) {
      if (s.state_out) store_states(s.state_out + from * s.dim * s.states, h, at, s.states);
      if (from + 1 < last()) enter(h, from + 1, at);
    }
  }
};

// Tokens [t, t + K) of a tile.
template <int L, bool kOutput, int K>
__device__ __forceinline__ void scan(States& h, const States& A, const Tokens<L>& tokens, int t, bool add) {
  using Place = Floats<L>;
  constexpr int kN = kTileStates<L>, kD = kTileChannels<L>;
  const int lane = tokens.lane, state = t * kN + lane % L * 4, channel = t * kD + lane / L * 4;
  Vec<4> y[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Vec<4> delta = load_vec<4>(tokens.floats(Place::kDelta + k * kD) + channel);
    const Vec<4> du = load_vec<4>(tokens.floats(Place::kDu + k * kD) + channel);
    const Vec<4> B = load_vec<4>(tokens.floats(Place::kB + k * kN) + state);
    const Vec<4> C = kOutput ? load_vec<4>(tokens.floats(Place::kC + k * kN) + state) : Vec<4>{};
    y[k] = advance<kOutput>(h, A, delta, du, B, C);
    if constexpr (kOutput) sum_over_states<L>(y[k], lane);
  }
  if constexpr (kOutput) {
    if constexpr (!kSlices<L>) __syncwarp();   // all lanes have read du of these tokens: y takes its place
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float* const to = tokens.floats(Place::kY + k * kD) + channel + sums_from<L>(lane);
      if (L <= 4 || lane % L < 4) {
#pragma unroll
        for (int i = 0; i < kSums<L>; ++i) to[i] = kSlices<L> && add ? to[i] + y[k][i] : y[k][i];
      }
    }
  }
}

// T is the one dtype of tiles that are whole, or void.
template <int L, bool kOutput, class T>
__global__ void __launch_bounds__(kThreads, 4) selective_scan_forward_kernel(SelectiveScan s, Plan p) {
  using Brought = std::conditional_t<std::is_void_v<T>, Tokens<L>, WholeTokens<L, T>>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int unit = int(blockIdx.x) * kWarps + warp, chunks = kOutput ? p.splits : p.splits - 1;
  const int row = unit / p.tiles / chunks, chunk = unit / p.tiles % chunks;
  if (row >= s.batch) return;
  const int begin = chunk * p.chunk, end = chunk + 1 == p.splits ? int(s.time) : begin + p.chunk;   // the sum may overflow
  const int slices = kSlices<L> ? p.slices : 1;
  const Brought tokens{s, p.layout, dynamic_smem<unsigned char>() + warp * p.layout.bytes, end, lane};
  tokens.set(tile_at<L>(int(s.dim), int(s.groups), unit % p.tiles), row);
  const Sequences sequences{s, tokens.walk()};
  const auto mine = [&] { return p.states + (int64_t(tokens.walk().row) * p.splits + begin / p.chunk) * s.dim * s.states; };

  Vec<4> steps{};
  States h, A;
  int sequence = chunk ? sequences.of(begin - 1) : sequences.of(0);
  for (int slice = 0; slice < slices; ++slice) {
    const Corner at = tokens.corner(slice);
    load_A(A, s.A, at, s.states);
    if (chunk) {
      load_states(h, kOutput ? mine() : nullptr, at, s.states, 0.f);
    } else {
      sequences.enter(h, sequences.first(), at);
      sequences.turn(h, sequences.first(), sequence, at);
    }
    if (slices > 1) store_states(mine(), h, at, s.states);
  }
  if (begin < end) {
    tokens.template fetch_rows<kOutput>(begin, 0);
    tokens.template fetch_shared<kOutput>(begin, 0);
  }
  for (int t = begin; t < end; t += kTokens<L>) {
    const int stage = unsigned(t) / kTokens<L> % 2;   // chunks begin at multiples of 64: the first tile is at 0
    const bool inside = s.sequence_of && lane < kTokens<L> && t + lane < end && t + lane > 0;
    const unsigned starts = __ballot_sync(~0u, inside && s.sequence_of[t + lane] != s.sequence_of[t + lane - 1]);
    const int before = sequence;
    for (int slice = 0; slice < slices; ++slice) {
      cp_async_wait_all();
      __syncwarp();   // the tile before has been read
      if (slice == 0) tokens.convert_rows(t, stage, steps);
      tokens.convert_shared(p.layout.shared[0], Floats<L>::kB);
      if (kOutput) tokens.convert_shared(p.layout.shared[1], Floats<L>::kC);
      __syncwarp();
      if (slice + 1 < slices) {
        tokens.template fetch_shared<kOutput>(t, slice + 1);
      } else if (t + kTokens<L> < end) {
        tokens.template fetch_shared<kOutput>(t + kTokens<L>, 0);
        tokens.template fetch_rows<kOutput>(t + kTokens<L>, stage ^ 1);
      }
      const Corner at = tokens.corner(slice);
      if (slices > 1) load_A(A, s.A, at, s.states), load_states(h, mine(), at, s.states, 0.f);
      sequence = before;
      for (int i = 0; i < kTokens<L>;) {
        if (starts >> i & 1) {
          const int to = s.sequence_of[t + i];
          if (kOutput) sequences.turn(h, sequence, to, at);
          else sequences.enter(h, to, at);
          sequence = to;
        }
        if (kOutput && i == 0 && s.checkpoints && t > 0 && t % kChunk == 0)
          store_states(s.checkpoints + (tokens.walk().row * checkpoints(s.time) + t / int(kChunk) - 1) * s.dim * s.states, h, at, s.states);
        const unsigned later = starts >> i >> 1;
        const int until = later ? i + __ffs(int(later)) : kTokens<L>;
        for (; i + kAtOnce<L> <= until; i += kAtOnce<L>) scan<L, kOutput, kAtOnce<L>>(h, A, tokens, i, slice > 0);
        for (; i < until; ++i) scan<L, kOutput, 1>(h, A, tokens, i, slice > 0);
      }
      if (slices > 1) store_states(mine(), h, at, s.states);
    }
    __syncwarp();
    if (kOutput) tokens.store_rows(t, stage);
  }

  for (int slice = 0; slice < slices; ++slice) {
    const Corner at = tokens.corner(slice);
    if (slices > 1) load_states(h, mine(), at, s.states, 0.f);
    if (!kOutput) store_states(mine(), h, at, s.states);
    else if (end == s.time) sequences.turn(h, sequence, sequences.last(), at);
  }
  if (!kOutput) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int d = 32 / L; d < 32; d *= 2) steps[c] += __shfl_xor_sync(~0u, steps[c], d);
      if (lane < 32 / L && c < tokens.channels())
        p.steps[(int64_t(tokens.walk().row) * p.splits + begin / p.chunk) * s.dim + tokens.channel() + c] = steps[c];
    }
  }
}

template <int L, bool kOutput, class T> int walk(const SelectiveScan& s, const Plan& p, void* stream) {
  const int64_t units = s.batch * (kOutput ? p.splits : p.splits - 1) * p.tiles;
  if (units > kLongest) return cudaErrorInvalidValue;
  const dim3 grid(unsigned((units + kWarps - 1) / kWarps));
  const size_t bytes = size_t(kWarps) * p.layout.bytes;
  return launch<selective_scan_forward_kernel<L, kOutput, T>>(grid, dim3(kThreads), bytes, stream, s, p);
}

template <int L, class T> int forward(const SelectiveScan& s, void* stream) {
  Plan p = plan<L>(s);
  if (p.splits > 1 || p.slices > 1) p.states = s.workspace;
  if (p.splits > 1) {
    p.steps = p.states + s.batch * p.splits * s.dim * s.states;
    if (const int error = walk<L, false, T>(s, p, stream)) return error;
    if (const int error = selective_scan_carry_cuda(s, p.splits, p.chunk, p.states, p.steps, stream)) return error;
  }
  return walk<L, true, T>(s, p, stream);
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
  for (const int64_t size : {s.batch, s.time, s.dim, s.states, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  return for_states(s.states, [&]<int L>() {
    if constexpr (L == 4)   // 16 states, those of Mamba
      if (whole<L, __nv_bfloat16>(s, DType::bf16)) return forward<L, __nv_bfloat16>(s, stream);
    return forward<L, void>(s, stream);
  });
}

}  // namespace pyseq
