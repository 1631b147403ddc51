// One launch, four channels a thread: the state is read and written once.
#include "cuda/device.cuh"
#include "ema/update.cuh"

namespace pyseq {
namespace {

constexpr int kChannels = 4, kStepThreads = 128;

struct Wide { bool state, x, y; };   // which tensors may be accessed four elements at a time

__global__ void __launch_bounds__(kStepThreads) ema_step_kernel(EmaStep s, Wide wide) {
  const int64_t quads = (s.dim + kChannels - 1) / kChannels, i = int64_t(blockIdx.x) * kStepThreads + threadIdx.x;
  const int64_t row = i / quads, channel = i % quads * kChannels, count = s.dim - channel;
  if (row >= s.batch) return;
  const float p = load(s.p, row * s.p.stride[0]);
  Vec<kChannels> y = load_vec<kChannels>(s.state, row * s.state.stride[0] + channel, wide.state, count);
  const Vec<kChannels> x = load_vec<kChannels>(s.x, row * s.x.stride[0] + channel, wide.x, count);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) y[k] = next(p, x[k], y[k]);
  store_vec<kChannels>(s.state, row * s.state.stride[0] + channel, y, wide.state, count);
  store_vec<kChannels>(s.y, row * s.y.stride[0] + channel, y, wide.y, count);
}

}  // namespace

int ema_step_cuda(const EmaStep& s, void* stream) {
  const int64_t threads = s.batch * ((s.dim + kChannels - 1) / kChannels);
  const int64_t blocks = (threads + kStepThreads - 1) / kStepThreads;
  if (blocks == 0) return 0;
  if (blocks > kLongest) return cudaErrorInvalidValue;
  const Wide wide{vectorisable(s.state, kChannels, 1), vectorisable(s.x, kChannels, 1), vectorisable(s.y, kChannels, 1)};
  return launch<ema_step_kernel>(dim3(unsigned(blocks)), dim3(kStepThreads), 0, stream, s, wide);
}

}  // namespace pyseq
