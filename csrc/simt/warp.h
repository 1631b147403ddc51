// Warp collectives as CUDA defines them (programming guide, "Warp Shuffle / Vote / Reduce Functions"): all lanes of the
// mask that have not exited meet; a lane that reads one which did not take part gets poison.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "simt/block.h"
#include "simt/shared_memory.h"

namespace simt {

using Where = std::source_location;

template <class T, class... U> constexpr bool is_one_of = (std::is_same_v<T, U> || ...);
template <class T>
concept Shuffled = is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double,
                             __half, __half2, __nv_bfloat16, __nv_bfloat162>;

template <class T> struct Shuffle { T value; int source; T result; };

template <class T> T shuffle(const char* call, uint32_t mask, T value, int source, const Where& where) {
  Shuffle<T> mine{value, source, value};
  const Combine combine = [](uint32_t present, void* const* operand) {
    for (uint32_t rest = present; rest; rest &= rest - 1) {
      auto& to = *static_cast<Shuffle<T>*>(operand[std::countr_zero(rest)]);
      if (present >> to.source & 1) to.result = static_cast<Shuffle<T>*>(operand[to.source])->value;
      else std::memset(static_cast<void*>(&to.result), kPoison, sizeof(T));
    }
  };
  meet({call, mask, where}, combine, &mine);
  return mine.result;
}

// The lane that `target` means for a warp cut into segments of `width`, or the own one where it leaves the segment.
inline int within(int target, int width) {
  const int first = int(lane()) & ~(width - 1);
  return target < first || target >= first + width ? int(lane()) : target;
}

template <class T> struct Reduction { T value, result; };

template <class Op, class T> T reduce(const char* call, uint32_t mask, T value, const Where& where) {
  Reduction<T> mine{value, value};
  const Combine combine = [](uint32_t present, void* const* operand) {
    const auto at = [&](uint32_t lanes) { return static_cast<Reduction<T>*>(operand[std::countr_zero(lanes)]); };
    T total = at(present)->value;
    for (uint32_t rest = present & (present - 1); rest; rest &= rest - 1) total = Op{}(total, at(rest)->value);
    for (uint32_t rest = present; rest; rest &= rest - 1) at(rest)->result = total;
  };
  meet({call, mask, where}, combine, &mine);
  return mine.result;
}

struct Add { template <class T> T operator()(T a, T b) const { return T(unsigned(a) + unsigned(b)); } };
struct Min { template <class T> T operator()(T a, T b) const { return std::min(a, b); } };
struct Max { template <class T> T operator()(T a, T b) const { return std::max(a, b); } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
template <class T>
concept Reduced = is_one_of<T, int, unsigned>;

}  // namespace simt

template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle(__func__, mask, value, (int(simt::lane()) & ~(width - 1)) | (source & (width - 1)), where);
}
template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle(__func__, mask, value, simt::within(int(simt::lane()) - int(delta), width), where);
}
template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  return simt::shuffle(__func__, mask, value, simt::within(int(simt::lane()) + int(delta), width), where);
}
// Unlike the others, xor may read an earlier segment; only a later one gives the own value.
template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Where where = simt::Where::current()) {
  const int lane = int(simt::lane()), target = lane ^ lane_mask, end = (lane & ~(width - 1)) + width;
  return simt::shuffle(__func__, mask, value, target < end ? target : lane, where);
}

inline void __syncwarp(unsigned mask = ~0u, simt::Where where = simt::Where::current()) {
  simt::meet({__func__, mask, where}, simt::order_memory, nullptr);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Or>(__func__, mask, unsigned(predicate != 0) << simt::lane(), where);
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Or>(__func__, mask, int(predicate != 0), where);
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::And>(__func__, mask, int(predicate != 0), where);
}
template <simt::Reduced T> T __reduce_add_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Add>(__func__, mask, value, where);
}
template <simt::Reduced T> T __reduce_min_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Min>(__func__, mask, value, where);
}
template <simt::Reduced T> T __reduce_max_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Max>(__func__, mask, value, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::And>(__func__, mask, value, where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Or>(__func__, mask, value, where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::current()) {
  return simt::reduce<simt::Xor>(__func__, mask, value, where);
}
