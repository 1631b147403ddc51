// Sums over partial results, in the order of the blocks: the same bits whatever the number of threads.
#pragma once
#include <cstdint>

namespace pyseq {

// total[i] = sum over b of partial[b, i]
inline void sum_blocks(const float* partial, int64_t blocks, int64_t size, float* total) {
  for (int64_t i = 0; i < size; ++i) total[i] = 0.f;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < size; ++i) total[i] += partial[b * size + i];
  }
}

}  // namespace pyseq
