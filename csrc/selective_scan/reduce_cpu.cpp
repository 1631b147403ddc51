// The second half of the backward: sums of what its blocks and rows left, in a fixed order.
#include "selective_scan/update.h"

namespace pyseq::PYSEQ_ISA {

void selective_scan_reduce_tokens(const SelectiveScan& s, int64_t begin, int64_t end) {
  const int64_t width = padded(s.states), count = blocks(s);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / s.time, t = i % s.time;
    for (int64_t group = 0; group < s.groups; ++group) {
      const float* from = s.dBC_blocks + ((row * s.groups + group) * count * s.time + t) * 2 * width;
      const int64_t to = (i * s.groups + group) * s.states;
      for (int64_t n = 0; n < s.states; n += W) {
        float dB[W] = {}, dC[W] = {};
        for (int64_t block = 0; block < count; ++block) {
          for (int64_t k = 0; k < W && n + k < s.states; ++k) {
            const float* four = from + block * s.time * 2 * width + (n + k) / 2 * 4 + k % 2;
            dB[k] += four[0];
            dC[k] += four[2];
          }
        }
        store(s.dB, to + n, load(dB), s.states - n);
        store(s.dC, to + n, load(dC), s.states - n);
      }
    }
  }
}

void selective_scan_reduce_channels(const SelectiveScan& s, int64_t begin, int64_t end) {
  const auto add = [&](float* to, const float* rows, int64_t width) {
    for (int64_t i = begin * width; i < end * width; ++i) {
      float sum = 0.f;
      for (int64_t row = 0; row < s.batch; ++row) sum += rows[row * s.dim * width + i];
      to[i] = sum;
    }
  };
  add(s.dA, s.dA_rows, s.states);
  if (s.dD) add(s.dD, s.dD_rows, 1);
  if (s.dbias) add(s.dbias, s.dbias_rows, 1);
}

}  // namespace pyseq::PYSEQ_ISA
