// What a thread brings in and takes out of a span: 8 channels of one token, as floats and as they lie in memory.
#pragma once
#include "selective_scan/backward.cuh"

namespace pyseq {
namespace {

// A thread's channels of its token: 4 column + {0..3} and 64 more. As floats, and as they lie in memory: a load is not
// waited for before its bits become floats. 16-bit elements lie in the first four words.
using Row = Vec<8>;
constexpr int kHalf = 64;
struct Bits {
  unsigned word[8];
};

__device__ __forceinline__ Row load_row(const float* token, const Place& at) {
  const Vec<4> x = load_vec<4>(token + 4 * at.column), y = load_vec<4>(token + 4 * at.column + kHalf);
  return {{x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]}};
}
__device__ __forceinline__ void store_row(float* token, const Row& x, const Place& at) {
  store_vec<4>(token + 4 * at.column, Vec<4>{{x[0], x[1], x[2], x[3]}});
  store_vec<4>(token + 4 * at.column + kHalf, Vec<4>{{x[4], x[5], x[6], x[7]}});
}

__device__ __forceinline__ Row floats(const Bits& bits, DType type) {
  Row x;
  if (type == DType::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(bits.word[i]);
  } else if (type == DType::bf16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(i % 2 ? bits.word[i / 2] & ~0xffffu : bits.word[i / 2] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = load(reinterpret_cast<const __half*>(bits.word) + i);
  }
  return x;
}

// Channel i of a row is `channel(i)` behind the first, and may not exist.
__device__ __forceinline__ int channel(int i) { return i % 4 + i / 4 * kHalf; }
__device__ __forceinline__ bool exists(int i, const Place& at) { return 4 * at.column + channel(i) < at.channels; }

// Where the thread's elements of a span are. They move along with the walk: to compute them anew would take longer than
// what they are for.
struct Cursors {
  const char *u, *dt, *z, *dy, *B, *C;
  char *du, *ddt, *dz;

  __device__ Cursors(const Place& at, int64_t t0) {
    const SelectiveScan& s = at.s;
    const auto find = [&](const View& x, int64_t i) {
      const int64_t token = at.row * x.stride[0] + (t0 + at.token) * x.stride[1];
      return x ? static_cast<char*>(x.data) + (token + i) * size_of(x.type) : nullptr;
    };
    const int64_t i = at.first + 4 * at.column;
    u = find(s.u, i), dt = find(s.dt, i), z = find(s.z, i), dy = find(s.dy, i);
    du = find(s.du, i), ddt = find(s.ddt, i), dz = find(s.dz, i);
    B = find(s.B, at.group * s.B.stride[2] + at.column), C = find(s.C, at.group * s.C.stride[2] + at.column);
  }
  __device__ __forceinline__ void move_inputs(const Strides& span, int64_t spans) {
    u += spans * span.u, dt += spans * span.dt, z += spans * span.z, dy += spans * span.dy;
    B += spans * span.B, C += spans * span.C;
  }
  __device__ __forceinline__ void move(const Strides& span, int64_t spans) {
    move_inputs(span, spans);
    du += spans * span.du, ddt += spans * span.ddt, dz += spans * span.dz;
  }
};

__device__ __forceinline__ unsigned load_element(const void* p, DType type) {
  return type == DType::f32 ? *static_cast<const unsigned*>(p) : *static_cast<const unsigned short*>(p);
}

// What does not exist is zero. near, far: whether the row's halves exist.
__device__ __forceinline__ Bits load_wide(const char* p, DType type, bool near, bool far) {
  if (type == DType::f32) {
    const uint4* const words = reinterpret_cast<const uint4*>(p);
    const uint4 a = near ? words[0] : uint4{}, b = far ? words[kHalf / 4] : uint4{};
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
  const uint2* const words = reinterpret_cast<const uint2*>(p);
  const uint2 a = near ? words[0] : uint2{}, b = far ? words[kHalf / 4] : uint2{};
  return {{a.x, a.y, b.x, b.y}};
}
__device__ __forceinline__ Bits load_narrow(const char* p, const View& x, bool here, const Place& at) {
  Bits bits = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {   // from some address in any case: without branches, no load waits for another
    const bool valid = here && exists(i, at);
    const unsigned read = load_element(valid ? p + channel(i) * size_of(x.type) : x.data, x.type);
    if (x.type == DType::f32) bits.word[i] = valid ? read : 0u;
    else bits.word[i / 2] |= (valid ? read : 0u) << 16 * (i % 2);
  }
  return bits;
}

template <class T> __device__ __forceinline__ void store_wide(char* to, const Row& x, const Place& at) {
  T* const p = reinterpret_cast<T*>(to);
  if (exists(0, at)) store_vec<4>(p, Vec<4>{{x[0], x[1], x[2], x[3]}});
  if (exists(4, at)) store_vec<4>(p + kHalf, Vec<4>{{x[4], x[5], x[6], x[7]}});
}
__device__ __forceinline__ void store_bits(char* p, const View& y, const Row& x, const Place& at) {
  if (at.w.vectorised) {
    switch (y.type) {
      case DType::bf16: return store_wide<__nv_bfloat16>(p, x, at);
      case DType::f16: return store_wide<__half>(p, x, at);
      default: return store_wide<float>(p, x, at);
    }
  }
  Row rest = x;   // the next one first
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    if (exists(i, at)) store(View{p, y.type}, channel(i), rest[0]);
#pragma unroll
    for (int j = 0; j < 7; ++j) rest[j] = rest[j + 1];
  }
}

}  // namespace
}  // namespace pyseq
