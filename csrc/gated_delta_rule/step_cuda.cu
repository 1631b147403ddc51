// A warp advances a tile of a head's state by one token. Bound by reading and writing the state: a thread has all of
// its part under way before it uses any, and neighbouring columns of a key are read together.
#include "cuda/device.cuh"
#include "gated_delta_rule/update.cuh"

namespace pyseq {
namespace {

constexpr int64_t kFewWarps = 264 * kWarps;   // two blocks for each multiprocessor of an H200

struct Wide {   // which rows may be read 4 elements at a time
  bool q, k, g, v;
};

template <int L, int F, class T>
__global__ void __launch_bounds__(kThreads, 3)
gated_delta_rule_step_kernel(GatedDeltaRuleStep s, Wide wide, int tiles) {
  const int lane = int(threadIdx.x % 32);
  const int64_t unit = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t row = unit / tiles / s.value_heads, head = unit / tiles % s.value_heads;
  if (row >= s.batch) return;
  const int64_t shared = head / (s.value_heads / s.heads);   // the head of q and k
  const int keys = int(s.keys), first = int(unit % tiles) * kTileColumns<L> + lane / L * 4;
  const int columns = within(4, int(s.values) - first);
  T* const states = static_cast<T*>(s.state.data) + row * s.state.stride[0] + head * s.state.stride[1];
  const TilePlace<L, T> place{states + first, s.state.stride[2], lane, keys, columns};
  StateTile<F> S;
  load_tile(S, place);
  const auto row_of = [&](const View& x, int64_t head, bool wide) {
    return [&, head, wide](int f) {
      const int key = place.key(4 * f);
      return load_vec<4>(x, row * x.stride[0] + head * x.stride[1] + key, wide, keys - key);
    };
  };
  float one = 0.f;
  if (s.g && s.one_decay) one = load(s.g, row * s.g.stride[0] + head);
  const auto decays = [&](int f) {
    Vec<4> w{one, one, one, one};
    if (s.g && !s.one_decay) w = row_of(s.g, head, wide.g)(f);
#pragma unroll
    for (int e = 0; e < 4; ++e) w[e] = decay_of(w[e]);
    return w;
  };
  const auto at = [&](const View& x) { return row * x.stride[0] + head * x.stride[1] + first; };
  const Vec<4> v = load_vec<4>(s.v, at(s.v), wide.v, columns);
  const float beta = load(s.beta, row * s.beta.stride[0] + head);
  const Vec<4> part = advance<L>(S, v, beta, row_of(s.q, shared, wide.q), row_of(s.k, shared, wide.k), decays);
  const float y = s.scale * sum_over_lanes<L>(part, lane);
  store_tile(S, place);
  if (lane % L < 4 && sum_row(lane) < columns) store(s.y, at(s.y) + sum_row(lane), y);
}

template <int L, int F, class T> int step(const GatedDeltaRuleStep& s, void* stream) {
  const auto four = [](const View& x) { return vectorisable(x, 4, 2); };
  const Wide wide{four(s.q), four(s.k), !s.one_decay && four(s.g), four(s.v)};
  const int64_t tiles = (s.values + kTileColumns<L> - 1) / kTileColumns<L>, warps = s.batch * s.value_heads * tiles;
  if (warps > kLongest) return cudaErrorInvalidValue;
  const int64_t together = warps < kFewWarps ? 1 : kWarps;
  const dim3 grid(unsigned((warps + together - 1) / together)), block(unsigned(32 * together));
  return launch<gated_delta_rule_step_kernel<L, F, T>>(grid, block, 0, stream, s, wide, int(tiles));
}

}  // namespace

int gated_delta_rule_step_cuda(const GatedDeltaRuleStep& s, void* stream) {
  if (s.batch == 0 || s.value_heads == 0) return 0;
  if (s.batch > kLongest || s.value_heads > kLongest) return cudaErrorInvalidValue;
  return for_keys(s.keys, [&]<int L, int F>() {
    return s.state.type == DType::f32 ? step<L, F, float>(s, stream) : step<L, F, __nv_bfloat16>(s, stream);
  });
}

}  // namespace pyseq
