// What blocks left of the gradients of one token and head, added over parts of the columns, the first part first.
#include "delta_rule/backward.cuh"

namespace pyseq::delta_rule {
namespace {

constexpr int kFinishThreads = 256;

__device__ __forceinline__ int64_t first() { return int64_t(blockIdx.x) * kFinishThreads + threadIdx.x; }
__device__ __forceinline__ int64_t step() { return int64_t(gridDim.x) * kFinishThreads; }

// Four keys of one tensor per thread.
__device__ __forceinline__ void finish(const DeltaRule& s, const Plan& p, const View& to, const View& from,
                                       int64_t slab, int64_t width) {
  const int64_t fours = (width + 3) / 4, all = s.batch * s.time * s.heads * fours;
  const bool wrong = invalid(s);
  for (int64_t i = first(); i < all; i += step()) {
    const int64_t k = i % fours * 4, head = i / fours % s.heads, t = i / fours / s.heads % s.time;
    const int64_t row = i / fours / s.heads / s.time, count = width - k;
    Vec<4> sum{};
    for (int64_t part = 0; part < p.parts && !wrong; ++part) {
      const int64_t at = part * slab + row * from.stride[0] + t * from.stride[1] + head * from.stride[2] + k;
      const Vec<4> more = load_vec<4>(from, at, width > 1, count);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += more[j];
    }
    if (wrong) sum = {{not_a_number(), not_a_number(), not_a_number(), not_a_number()}};
    store_vec<4>(to, row * to.stride[0] + t * to.stride[1] + head * to.stride[2] + k, sum, false, count);
  }
}

__global__ void __launch_bounds__(kFinishThreads) delta_rule_finish_kernel(DeltaRule s, Plan p) {
  const bool wrong = invalid(s);
  if (p.parts == 1 && !wrong) return;
  finish(s, p, s.dq, p.dq, p.slab, s.keys);
  finish(s, p, s.dk, p.dk, p.slab, s.keys);
  if (s.a) {
    finish(s, p, s.da, p.da, p.slab, s.keys);
    finish(s, p, s.db, p.db, p.slab, s.keys);
  }
  if (s.g) {
    View dg = s.dg;
    if (s.one_decay) dg.stride[2] = 1;
    finish(s, p, dg, p.dg, p.slab_g, s.one_decay ? 1 : s.keys);
  }
  if (!wrong) return;
  finish(s, p, s.dv, s.dv, 0, s.values);
  const int64_t size = s.dstate ? s.sequences * s.heads * s.keys * s.values : 0;
  for (int64_t i = first(); i < size; i += step()) s.dstate[i] = not_a_number();
}

}  // namespace

int delta_rule_finish_cuda(const DeltaRule& s, void* stream) {
  const Plan p(s);
  const int64_t fours = s.batch * s.time * s.heads * ((s.keys + 3) / 4);
  const int64_t blocks = (fours + kFinishThreads - 1) / kFinishThreads;
  const dim3 grid(unsigned(blocks < 1 ? 1 : blocks < 4096 ? blocks : 4096));
  return launch<delta_rule_finish_kernel>(grid, dim3(kFinishThreads), 0, stream, s, p);
}

}  // namespace pyseq::delta_rule
