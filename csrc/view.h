// How every kernel sees a tensor: an address, a dtype and strides in elements (never bytes). The last axis is contiguous.
#pragma once
#include <cstdint>

namespace pyseq {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// An absent optional argument is a View whose data is null.
struct View {
  void* data = nullptr;
  DType type = DType::f32;
  int64_t stride[4] = {};   // of the leading axes, in order; the last axis has stride 1

  constexpr explicit operator bool() const { return data != nullptr; }
  void* at(int64_t i) const { return static_cast<char*>(data) + i * size_of(type); }
};

}  // namespace pyseq
