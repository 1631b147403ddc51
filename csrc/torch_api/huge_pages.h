// Fresh memory costs a page fault per 4 KiB, 5 ms for the 12 MB of a typical output, as long as a third of a selective scan
// of that size. In pages of 2 MiB it is 1.3 ms. Only large tensors are worth the call. A GPU's memory is not ours to advise on.
#pragma once
#include <sys/mman.h>

#include "torch_api/stable.h"

namespace pyseq {

template <Twin twin> Tensor in_huge_pages(Tensor t) {
#ifdef MADV_HUGEPAGE
  if constexpr (twin == Twin::cuda) return t;
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + t.numel() * t.element_size()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}
template <Twin twin> Tensor large_like(const Tensor& like) {
  return in_huge_pages<twin>(new_tensor_like(like, like.scalar_type()));
}

}  // namespace pyseq
