// Where the segments of a sequence end becomes where they begin. A thread per state; in order, so the same bits always.
#include "ssd/forward.cuh"

namespace pyseq {
namespace {

__global__ void __launch_bounds__(kThreads) ssd_carry_kernel(Ssd s, Segments g) {
  const int64_t of_head = s.width * s.states, size = s.heads * of_head;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.sequences * size) return;
  const int64_t sequence = i / size, state = i % size;
  float* at = g.states + sequence * g.splits * size + state;
  const float* decay = g.decays + sequence * g.splits * s.heads + state / of_head;
  float S = *at;
#pragma unroll 4
  for (int k = 1; k + 1 < g.splits; ++k) {
    at += size, decay += s.heads;
    const float end = *at, a = ex2(*decay);
    *at = S;
    S = fmaf(a, S, end);
  }
  at[size] = S;   // the last segment has no end here
}

}  // namespace

int ssd_carry_cuda(const Ssd& s, const Segments& g, void* stream) {
  const dim3 grid(unsigned((s.sequences * s.heads * s.width * s.states + kThreads - 1) / kThreads));
  return launch<ssd_carry_kernel>(grid, dim3(kThreads), 0, stream, s, g);
}

}  // namespace pyseq
