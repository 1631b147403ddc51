// Rows of tensors on their way to shared memory, where they wait as they are while what came before is computed: a
// thread copies 4 neighbouring elements at a time. The copies do not ask what a number means, only how long it is.
#pragma once
#include "cuda/async.cuh"
#include "cuda/vector.cuh"

namespace pyseq {

// How a tensor is read, and where its elements wait, in bytes.
struct Staged {
  View x;
  bool wide;   // each copy is one access, or is made of them
  int raw;
};

// Room for `elements` of x from byte `end` on; `axes` lead to its rows, which are copied `each` elements at a time.
inline Staged stage(const View& x, int axes, int elements, int& end, int each = 4) {
  const Staged staged{x, vectorisable(x, each, axes), end};
  end += x ? elements * int(size_of(x.type)) : 0;
  return staged;
}

// Copies 4 elements, zeros for those from `count` on. What cannot be one access is not worth overlapping.
__device__ __forceinline__ void copy_four(const Staged& x, unsigned char* to, int64_t offset, int count) {
  const int size = int(size_of(x.x.type));
  const unsigned char* const from = static_cast<const unsigned char*>(x.x.data) + offset * size;
  if (x.wide) {
    if (size == 4) cp_async<16>(to, from, count * 4);
    else cp_async<8>(to, from, count * 2);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if (size == 4) reinterpret_cast<uint32_t*>(to)[i] = i < count ? reinterpret_cast<const uint32_t*>(from)[i] : 0u;
    else reinterpret_cast<uint16_t*>(to)[i] = i < count ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t(0);
  }
}

// Elements 4 i to 4 i + 3 of those that wait.
__device__ __forceinline__ Vec<4> staged_four(const unsigned char* memory, const Staged& x, int i) {
  return load_vec<4>(View{const_cast<unsigned char*>(memory) + x.raw, x.x.type, {}}, i * 4, true);
}

}  // namespace pyseq
