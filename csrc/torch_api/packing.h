// cu_seqlens as the kernels of either twin want it.
#pragma once
#include "cuda/packing.h"
#include "torch_api/stable.h"

namespace pyseq {

struct Packing {
  Tensor cu_seqlens;          // int64 [S + 1], contiguous
  OptionalTensor sequence_of; // CUDA: int32 [T + 1], see cuda/packing.h
  bool valid = true;          // CPU: from 0 to T, non-decreasing. Unknown on CUDA, where the kernels find out

  int64_t sequences() const { return cu_seqlens.numel() - 1; }
  const int64_t* boundaries() const { return cu_seqlens.const_data_ptr<int64_t>(); }
  const int32_t* owners() const { return sequence_of ? sequence_of->const_data_ptr<int32_t>() : nullptr; }
};

// Values that Python could not look at (compiled calls, CUDA) may be anything: no kernel may follow them out of bounds.
template <Twin twin> std::optional<Packing> packing(const OptionalTensor& cu_seqlens, int64_t time) {
  if (!cu_seqlens) return std::nullopt;
  Packing p{torch::stable::contiguous(cast(*cu_seqlens, ScalarType::Long)), std::nullopt};
  if constexpr (twin == Twin::cpu) {
    const int64_t* at = p.boundaries();
    p.valid = at[0] == 0 && at[p.sequences()] == time;
    for (int64_t s = 0; s < p.sequences(); ++s) p.valid = p.valid && at[s] <= at[s + 1];
  } else {
    p.sequence_of = new_tensor(p.cu_seqlens, {time + 1}, ScalarType::Int);
    const Packed packed{p.boundaries(), p.sequences(), time, p.sequence_of->mutable_data_ptr<int32_t>()};
    check_launch("packing", packing_cuda(packed, Launch(p.cu_seqlens).stream));
  }
  return p;
}

}  // namespace pyseq
