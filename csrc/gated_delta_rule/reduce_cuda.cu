// What the blocks of the backward have in parts, summed in a fixed order: over the columns that they had, and for q and
// k over the value heads that share them.
#include "gated_delta_rule/backward.cuh"

namespace pyseq {
namespace {

// out[b, t, h] = sum over n and p of from[p, b, t, h n + ..], rows of `width` numbers.
struct Sum {
  View out;
  bool wide;              // 4 numbers at a time
  const float* from;
  int64_t rows, time, width;   // B T rows of `heads` heads
  int heads, shared, parts;
};

__global__ void __launch_bounds__(kThreads) gated_delta_rule_reduce_kernel(Sum s) {
  const int fours = int(s.width + 3) / 4;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, unit = i / fours;
  const int column = int(i % fours) * 4, head = int(unit % s.heads);
  const int64_t row = unit / s.heads, count = s.width - column;
  if (row >= s.rows) return;
  const View from{const_cast<float*>(s.from), DType::f32, {}};
  Vec<4> sum{};
#pragma unroll 1
  for (int n = 0; n < s.shared; ++n) {
#pragma unroll 1
    for (int p = 0; p < s.parts; ++p) {
      const int64_t at = ((p * s.rows + row) * s.heads * s.shared + head * s.shared + n) * s.width + column;
      const Vec<4> x = load_vec<4>(from, at, s.width % 4 == 0, count);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += x[e];
    }
  }
  const int64_t to = row / s.time * s.out.stride[0] + row % s.time * s.out.stride[1] + head * s.out.stride[2] + column;
  store_vec<4>(s.out, to, sum, s.wide, count);
}

int reduce(Sum s, void* stream) {
  const int64_t units = s.rows * s.heads * ((s.width + 3) / 4), blocks = (units + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch<gated_delta_rule_reduce_kernel>(dim3(unsigned(blocks)), dim3(kThreads), 0, stream, s);
}

}  // namespace

int gated_delta_rule_reduce_cuda(const GatedDeltaRule& s, const Partials& p, int parts, void* stream) {
  const int64_t rows = s.batch * s.time;
  const int H = int(s.heads), HV = int(s.value_heads);
  const auto of_keys = [&](const View& out, const float* from, int heads) {
    return reduce({out, vectorisable(out, 4, 3), from, rows, s.time, s.keys, heads, HV / heads, parts}, stream);
  };
  const auto of_heads = [&](const View& out, const float* from) {   // one number for each: heads are a row's columns
    return reduce({out, vectorisable(out, 4, 2), from, rows, s.time, HV, 1, 1, parts}, stream);
  };
  if (const int error = of_keys(s.dq, p.q, H)) return error;
  if (const int error = of_keys(s.dk, p.k, H)) return error;
  if (const int error = of_heads(s.dbeta, p.beta)) return error;
  if (!s.dg) return 0;
  return s.one_decay ? of_heads(s.dg, p.g) : of_keys(s.dg, p.g, HV);
}

}  // namespace pyseq
