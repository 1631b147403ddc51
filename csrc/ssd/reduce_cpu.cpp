// The second half of the backward: sums of what its units left, in a fixed order.
#include "ssd/backward_work.h"

namespace pyseq::PYSEQ_ISA {

void ssd_reduce_tokens(const Ssd& s, int64_t begin, int64_t end) {
  if (whole_groups(s)) return;
  const int64_t all = blocks(s);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / s.time, t = i % s.time;
    for (int64_t group = 0; group < s.groups; ++group) {
      const int64_t dB = row * s.dB.stride[0] + t * s.dB.stride[1] + group * s.dB.stride[2];
      const int64_t dC = row * s.dC.stride[0] + t * s.dC.stride[1] + group * s.dC.stride[2];
      for (int64_t n = 0; n < s.states; n += W) {
        vf sum_B{}, sum_C{};
        for (int64_t block = 0; block < all; ++block) {
          const float* from = slab(s, block, i, group) + n;
          sum_B += load(from, s.states - n);
          sum_C += load(from + s.states, s.states - n);
        }
        store(s.dB, dB + n, sum_B, s.states - n);
        store(s.dC, dC + n, sum_C, s.states - n);
      }
    }
  }
}

void ssd_reduce_heads(const Ssd& s, int64_t begin, int64_t end) {
  const auto add = [&](float* to, const float* sums, int64_t width) {
    for (int64_t i = begin * width; i < end * width; ++i) {
      double total = 0;
      for (int64_t sequence = 0; sequence < s.sequences; ++sequence) total += sums[sequence * s.heads * width + i];
      to[i] = float(total);
    }
  };
  add(s.dA, sums_A(s), 1);
  if (s.dbias) add(s.dbias, sums_bias(s), 1);
  if (s.dD) add(s.dD, sums_D(s), s.D_width);
}

}  // namespace pyseq::PYSEQ_ISA
