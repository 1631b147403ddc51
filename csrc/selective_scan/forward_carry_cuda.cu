// Where the chunks of a row end becomes where they begin. All of a chunk multiplies the state it begins with by
// exp(A sum delta), unless a sequence begins in it. A thread per channel and state of a row; in order, so the same bits always.
#include "cuda/math.cuh"
#include "selective_scan/forward.cuh"

namespace pyseq {
namespace {

__global__ void __launch_bounds__(kThreads)
    selective_scan_carry_kernel(SelectiveScan s, int splits, int chunk, float* states, const float* steps) {
  const int64_t size = s.dim * s.states, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.batch * size) return;
  const int64_t row = i / size, state = i % size, channel = state / s.states;
  const float A = s.A[state] * kLog2e;
  float* at = states + row * splits * size + state;
  float h = *at;
  for (int k = 1; k < splits; ++k) {
    at += size;
    const float end = k + 1 < splits ? *at : 0.f;   // no chunk begins where the last one ends
    *at = h;
    const int first = k * chunk, last = min(first + chunk, int(s.time)) - 1;
    const bool starts = s.sequence_of && s.sequence_of[first - 1] != s.sequence_of[last];
    // Half the exponent at a time: a large factor of a small state, or the other way round, is not lost on the way.
    const float root = ex2(0.5f * A * steps[(row * splits + k) * s.dim + channel]);
    h = starts || h == 0.f ? end : fmaf(root, root * h, end);
  }
}

}  // namespace

int selective_scan_carry_cuda(const SelectiveScan& s, int splits, int chunk, float* states, const float* steps, void* stream) {
  const dim3 grid(unsigned((s.batch * s.dim * s.states + kThreads - 1) / kThreads));
  return launch<selective_scan_carry_kernel>(grid, dim3(kThreads), 0, stream, s, splits, chunk, states, steps);
}

}  // namespace pyseq
