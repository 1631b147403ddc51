// Where the chunks of a row end becomes where they begin. All of a chunk multiplies the state it begins with by
// exp(A sum delta), unless a sequence begins in it. A thread per channel and state of a row; in order, so the same bits always.
#include "cuda/math.cuh"
#include "selective_scan/forward.cuh"

namespace pyseq {
namespace {

constexpr int kAtOnce = 8;   // chunks that are on their way together

__global__ void __launch_bounds__(kThreads)
    selective_scan_carry_kernel(SelectiveScan s, int splits, int chunk, float* states, const float* steps) {
  const int64_t size = s.dim * s.states, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.batch * size) return;
  const int64_t row = i / size, state = i % size, channel = state / s.states;
  const float A = s.A[state] * kLog2e;
  float* at = states + row * splits * size + state;
  const float* step = steps + row * splits * s.dim + channel;
  float h = *at;
  at += size, step += s.dim;
#pragma unroll 1
  for (int k = 1; k < splits; k += kAtOnce, at += kAtOnce * size, step += kAtOnce * s.dim) {
    const int inner = splits - 1 - k;   // no chunk begins where the last one ends: it has neither end nor step
    float end[kAtOnce], sum[kAtOnce];
    int before[kAtOnce], after[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {   // only loads, so that none waits for another
      const bool there = i < inner, packed = there && s.sequence_of;
      const int first = (k + i) * chunk;
      end[i] = there ? at[i * size] : 0.f;
      sum[i] = there ? step[i * s.dim] : 0.f;
      before[i] = packed ? s.sequence_of[first - 1] : 0;
      after[i] = packed ? s.sequence_of[first + chunk - 1] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i > inner) break;
      at[i * size] = h;
      // Half the exponent at a time: a large factor of a small state, or the other way round, is not lost on the way.
      const float root = ex2(0.5f * A * sum[i]);
      h = before[i] != after[i] || h == 0.f ? end[i] : fmaf(root, root * h, end[i]);
    }
  }
}

}  // namespace

int selective_scan_carry_cuda(const SelectiveScan& s, int splits, int chunk, float* states, const float* steps, void* stream) {
  const dim3 grid(unsigned((s.batch * s.dim * s.states + kThreads - 1) / kThreads));
  return launch<selective_scan_carry_kernel>(grid, dim3(kThreads), 0, stream, s, splits, chunk, states, steps);
}

}  // namespace pyseq
