// Which packed sequence each token belongs to, worked out on the device: the host never reads cu_seqlens there.
#pragma once
#include <cstdint>

namespace pyseq {

// Fills sequence_of[0 .. T]: the index of token t's sequence, and S at t = T, which belongs to none. Where cu_seqlens
// [S + 1] does not rise from 0 to T every entry is -1: kernels then write NaN, and read nothing through it.
struct Packed {
  const int64_t* cu_seqlens;
  int64_t sequences, time;
  int32_t* sequence_of;
};

int packing_cuda(const Packed&, void* stream);   // a cudaError_t

}  // namespace pyseq
