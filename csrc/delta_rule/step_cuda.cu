// A warp advances a tile of a head's state by one token. Bound by reading and writing the state: a thread has all of
// its part under way before it uses any, and neighbouring columns of a key are read together.
#include "cuda/device.cuh"
#include "delta_rule/update.cuh"

namespace pyseq {
namespace {

constexpr int64_t kFewWarps = 264 * kWarps;   // two blocks for each multiprocessor of an H200

struct Wide {   // which rows may be read 4 elements at a time
  bool q, k, a, b, g, v;
};

template <bool kCorrect, int L, int F, class T>
__global__ void __launch_bounds__(kThreads, F < 4 ? 3 : 2)
    delta_rule_step_kernel(DeltaRuleStep s, Wide wide, int tiles) {
  const int lane = int(threadIdx.x % 32);
  const int64_t unit = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t row = unit / tiles / s.heads, head = unit / tiles % s.heads;
  if (row >= s.batch) return;
  const int keys = int(s.keys), first = int(unit % tiles) * kTileColumns<L> + lane / L * 4;
  const int columns = within(4, int(s.values) - first);
  T* const state = static_cast<T*>(s.state.data) + row * s.state.stride[0] + head * s.state.stride[1];
  const TilePlace<L, T> place{state + first, s.state.stride[2], lane, keys, columns};
  StateTile<F> S;
  load_tile(S, place);
  const auto row_of = [&](const View& x, bool wide) {
    return [&, wide](int f) {
      const int key = place.key(4 * f);
      return load_vec<4>(x, row * x.stride[0] + head * x.stride[1] + key, wide, keys - key);
    };
  };
  const auto at = [&](const View& x) { return row * x.stride[0] + head * x.stride[1] + first; };
  Vec<4 * F> w;
#pragma unroll
  for (int f = 0; f < F; ++f) {
    Vec<4> g{};
    if (s.g && s.one_decay) {
      g[0] = g[1] = g[2] = g[3] = load(s.g, row * s.g.stride[0] + head);
    } else if (s.g) {
      g = row_of(s.g, wide.g)(f);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) w[4 * f + e] = decay_of(g[e]);
  }
  const auto decays = [&](int f) { return Vec<4>{w[4 * f], w[4 * f + 1], w[4 * f + 2], w[4 * f + 3]}; };
  const Vec<4> v = load_vec<4>(s.v, at(s.v), wide.v, columns);
  const Vec<4> part = advance<kCorrect, L>(S, v, row_of(s.q, wide.q), row_of(s.k, wide.k), decays,
                                           row_of(s.a, wide.a), row_of(s.b, wide.b));
  const float y = s.scale * sum_over_lanes<L>(part, lane);
  store_tile(S, place);
  if (lane % L < 4 && sum_row(lane) < columns) store(s.y, at(s.y) + sum_row(lane), y);
}

template <bool kCorrect, int L, int F, class T> int step(const DeltaRuleStep& s, void* stream) {
  const auto four = [](const View& x) { return vectorisable(x, 4, 2); };
  const Wide wide{four(s.q), four(s.k), four(s.a), four(s.b), !s.one_decay && four(s.g), four(s.v)};
  const int64_t tiles = (s.values + kTileColumns<L> - 1) / kTileColumns<L>, warps = s.batch * s.heads * tiles;
  if (warps > kLongest) return cudaErrorInvalidValue;
  const int64_t together = warps < kFewWarps ? 1 : kWarps;
  const dim3 grid(unsigned((warps + together - 1) / together)), block(unsigned(32 * together));
  return launch<delta_rule_step_kernel<kCorrect, L, F, T>>(grid, block, 0, stream, s, wide, int(tiles));
}

}  // namespace

int delta_rule_step_cuda(const DeltaRuleStep& s, void* stream) {
  if (s.batch == 0 || s.heads == 0) return 0;
  if (s.batch > kLongest || s.heads > kLongest) return cudaErrorInvalidValue;
  return for_keys(s.keys, [&]<int L, int F>() {
    const bool floats = s.state.type == DType::f32;
    if (s.a) return floats ? step<true, L, F, float>(s, stream) : step<true, L, F, __nv_bfloat16>(s, stream);
    return floats ? step<false, L, F, float>(s, stream) : step<false, L, F, __nv_bfloat16>(s, stream);
  });
}

}  // namespace pyseq
