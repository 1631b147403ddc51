// A group stays in the registers of its threads between the sum of squares and the scaled row: memory is read once.
#include "rms_norm_gated/update.cuh"

namespace pyseq {
namespace {

// Both orders of norm and gate are y = w r (s gate); they differ in what is squared.
template <class E> struct Row {
  const RmsNormGated& a;
  int64_t x, z, residual, y, sum, last;

  struct Loaded { Raw x, z, residual; };

  __device__ __forceinline__ Loaded load(int64_t d) const {
    Loaded in;
    in.x = load_raw<E>(a.x, x + d, last - d);
    if (a.z) in.z = load_raw<E>(a.z, z + d, last - d);
    if (a.sum) in.residual = load_raw<E>(a.residual, residual + d, last - d);
    return in;
  }
  // s gate, and the squares; stores s.
  __device__ __forceinline__ Vec<n> gated(const Loaded& in, int64_t d, float& squares) const {
    Vec<n> s = unpack<E>(in.x, a.x.type);
    if (a.sum) {
      const Vec<n> more = unpack<E>(in.residual, a.residual.type);
#pragma unroll
      for (int i = 0; i < n; ++i) s[i] += more[i];
      store_floats<E>(a.sum + sum + d, s, last - d);
    }
    Vec<n> v = s;
    if (a.z) {
      const Vec<n> gate = unpack<E>(in.z, a.z.type);
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] *= silu(gate[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float squared = a.norm_before_gate ? s[i] : v[i];
      squares = fmaf(squared, squared, squares);
    }
    return v;
  }
  __device__ __forceinline__ void scale(const Vec<n>& v, float r, int64_t d) const {
    Vec<n> out = load_floats<E>(a.weight + d, last - d);
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] *= v[i] * r;
    store_as<E>(a.y, y + d, out, last - d);
  }
};

template <class E>
__global__ void __launch_bounds__(kNormMost, 1) rms_norm_gated_kernel(RmsNormGated a, int threads, unsigned groups) {
  if (a.rows == 0) return;
  const unsigned unit = norm_unit(threads);
  const bool exists = unit < a.rows * groups;   // threads without a group still meet the others of their warp
  const int64_t row = exists ? unit / groups : 0, first = exists ? unit % groups * a.group : 0;
  const int64_t last = exists ? first + a.group : 0, step = int64_t(threads) * n;
  const int64_t begin = first + int64_t(norm_lane(threads)) * n;
  const Outer outer(row, a.inner);
  const Row<E> at{a, outer.in(a.x), outer.in(a.z), outer.in(a.residual), outer.in(a.y), row * a.dim, last};
  typename Row<E>::Loaded in[kVectors];
  Vec<n> v[kVectors];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (begin + i * step < last) in[i] = at.load(begin + i * step);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (begin + i * step < last) v[i] = at.gated(in[i], begin + i * step, squares);
  }
#pragma unroll 1
  for (int64_t d = begin + kVectors * step; d < last; d += step) at.gated(at.load(d), d, squares);
  const float r = rsqrtf(norm_sum(squares, threads) / float(a.group) + a.eps);
  if (!exists) return;
  if (norm_lane(threads) == 0) a.rstd[unit] = r;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (begin + i * step < last) at.scale(v[i], r, begin + i * step);
  }
#pragma unroll 1
  for (int64_t d = begin + kVectors * step; d < last; d += step) at.scale(at.gated(at.load(d), d, squares), r, d);
}

}  // namespace

int rms_norm_gated_cuda(const RmsNormGated& a, void* stream) {
  const int threads = norm_threads(a.group);
  const unsigned groups = unsigned(a.dim / a.group);
  const dim3 grid = norm_grid(a.rows * groups, threads), block(unsigned(norm_block(threads)));
  return for_dtype(a.group, a.weight, {a.x, a.z, a.residual, a.y}, [&]<class E>() {
    return launch<rms_norm_gated_kernel<E>>(grid, block, 0, stream, a, threads, groups);
  });
}

}  // namespace pyseq
