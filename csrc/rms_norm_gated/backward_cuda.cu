// With x_hat = v r and q = e w, where e is the gradient at w x_hat (dy, times silu(z) where the norm came first):
//   dw = sum e x_hat     dv = r (q - x_hat mean(q x_hat))
//   gate first: ds = dv silu(z), dz = dv s silu'(z)     norm first: ds = dv, dz = dy w x_hat silu'(z)
// Two launches. A group's threads go through a block of rows, twice through each: what they loaded would not fit into
// registers beside their part of dw, which they keep until the last row, but it stays in the first cache. Then the
// parts are added in order. No atomics: the same bits every run.
#include "rms_norm_gated/update.cuh"

namespace pyseq {
namespace {

template <class E> struct Row {
  const RmsNormGatedBackward& a;
  Outer outer;   // where the row lies in each tensor is computed where it is used: that takes fewer registers
  int64_t last;
  float r;

  struct Loaded { Raw dy, s, z; };

  __device__ __forceinline__ Raw raw(const View& x, int64_t d) const {
    return load_raw<E>(x, outer.in(x) + d, last - d);
  }
  __device__ __forceinline__ Loaded load(int64_t d) const {
    Loaded in;
    in.dy = raw(a.dy, d);
    in.s = raw(a.s, d);
    if (a.z) in.z = raw(a.z, d);
    return in;
  }
  // The part of dw: dy s r silu(z) in either order. dot += w times it.
  __device__ __forceinline__ Vec<n> dweight(const Loaded& in, int64_t d, float& dot) const {
    Vec<n> part = unpack<E>(in.dy, a.dy.type);
    const Vec<n> sv = unpack<E>(in.s, a.s.type), w = load_floats<E>(a.weight + d, last - d);
#pragma unroll
    for (int i = 0; i < n; ++i) part[i] *= sv[i] * r;
    if (a.z) {
      const Vec<n> zv = unpack<E>(in.z, a.z.type);
#pragma unroll
      for (int i = 0; i < n; ++i) part[i] *= silu(zv[i]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) dot = fmaf(part[i], w[i], dot);
    return part;
  }
  __device__ __forceinline__ void data(const Loaded& in, int64_t d, float mean) const {
    const bool first = a.z && !a.norm_before_gate;   // the gate before the norm
    Raw arriving;
    if (a.dsum) arriving = raw(a.dsum, d);
    const Vec<n> sv = unpack<E>(in.s, a.s.type), w = load_floats<E>(a.weight + d, last - d);
    Vec<n> ds = unpack<E>(in.dy, a.dy.type);
    if (a.z) {
      Vec<n> dzv = unpack<E>(in.z, a.z.type);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float gate = silu(dzv[i]), q = first ? ds[i] * w[i] : ds[i] * gate * w[i];
        const float x_hat = first ? sv[i] * r * gate : sv[i] * r;
        const float dv = (q - x_hat * mean) * r;
        dzv[i] = (first ? dv * sv[i] : ds[i] * w[i] * x_hat) * silu_grad(dzv[i]);
        ds[i] = first ? dv * gate : dv;
      }
      store_as<E>(a.dz, outer.in(a.dz) + d, dzv, last - d);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) ds[i] = (ds[i] * w[i] - sv[i] * r * mean) * r;
    }
    if (a.dsum) {
      const Vec<n> more = unpack<E>(arriving, a.dsum.type);
#pragma unroll
      for (int i = 0; i < n; ++i) ds[i] += more[i];
    }
    store_as<E>(a.dx, outer.in(a.dx) + d, ds, last - d);
    if (a.dresidual) store_as<E>(a.dresidual, outer.in(a.dresidual) + d, ds, last - d);
  }
};

// With 96 registers a thread, 640 threads are resident: two blocks for groups of 5120, of which one works while the
// other waits at its barriers. The kernel for tensors that are not whole vectors would spill.
constexpr int kResident = 640;
template <class E> constexpr int kBound = vectorised<E> ? kResident : kNormMost;

template <class E>
__global__ void __launch_bounds__(kBound<E>, 1)
rms_norm_gated_backward_kernel(RmsNormGatedBackward a, int threads, unsigned groups) {
  const unsigned unit = norm_unit(threads);
  const int64_t block = unit / groups, group = unit % groups;
  const int64_t first = block * a.rows_per_block;
  const unsigned turns = unsigned(a.rows_per_block);
  const unsigned rows = unsigned(max(min(a.rows - first, a.rows_per_block), int64_t(0)));   // none for threads beyond
  const int64_t last = (group + 1) * a.group, step = int64_t(threads) * n;
  const int64_t begin = group * a.group + int64_t(norm_lane(threads)) * n;
  Vec<n> dweight[kVectors]{};
  // As many turns for every thread, so that all of a warp meet in the sum.
  for (unsigned i = 0; i < turns; ++i) {
    const int64_t row = first + i;
    const bool exists = i < rows;
    const Row<E> at{a, Outer(exists ? row : 0, a.inner), last, exists ? a.rstd[row * groups + group] : 0.f};
    typename Row<E>::Loaded in[kVectors];
    float dot = 0.f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (exists && begin + k * step < last) in[k] = at.load(begin + k * step);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!exists || begin + k * step >= last) continue;
      const Vec<n> part = at.dweight(in[k], begin + k * step, dot);
#pragma unroll
      for (int j = 0; j < n; ++j) dweight[k][j] += part[j];
    }
#pragma unroll 1
    for (int64_t d = begin + kVectors * step; exists && d < last; d += step) {
      Vec<n> part = at.dweight(at.load(d), d, dot);
      if (i > 0) {
        const Vec<n> before = load_floats<E>(a.partial + block * a.dim + d, last - d);
#pragma unroll
        for (int j = 0; j < n; ++j) part[j] += before[j];
      }
      store_floats<E>(a.partial + block * a.dim + d, part, last - d);
    }
    const float mean = norm_sum(dot, threads) / float(a.group);
#pragma unroll 1
    for (int64_t d = begin; exists && d < last; d += step) at.data(at.load(d), d, mean);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t d = begin + k * step;
    if (rows > 0 && d < last) store_floats<E>(a.partial + block * a.dim + d, dweight[k], last - d);
  }
}

// Partial sums of all blocks of rows: every sixteenth by one warp, then the sixteen in order.
constexpr int kSlices = 16;

__global__ void __launch_bounds__(32 * kSlices) rms_norm_gated_sum_kernel(RmsNormGatedBackward a, int64_t blocks) {
  __shared__ float slices[kSlices][32];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t d = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (d < a.dim) {
#pragma unroll 4
    for (int64_t block = slice; block < blocks; block += kSlices) sum += a.partial[block * a.dim + d];
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || d >= a.dim) return;
  for (int i = 1; i < kSlices; ++i) sum += slices[i][lane];
  a.dweight[d] = sum;
}

}  // namespace

// As many blocks as an H200 holds at once, so that none is left over for another wave.
int64_t rms_norm_gated_rows_per_block(int64_t rows, int64_t dim, int64_t group) {
  const int threads = norm_threads(group), block = norm_block(threads);
  const int64_t units = 132 * (kResident / block) * (block / threads), blocks = max(units / (dim / group), int64_t(1));
  return max((rows + blocks - 1) / blocks, int64_t(4));
}

int rms_norm_gated_backward_cuda(const RmsNormGatedBackward& a, void* stream) {
  const int64_t blocks = (a.rows + a.rows_per_block - 1) / a.rows_per_block;
  const unsigned groups = unsigned(a.dim / a.group);
  if (blocks > 0) {
    const int threads = norm_threads(a.group);
    const dim3 grid = norm_grid(blocks * groups, threads), block(unsigned(norm_block(threads)));
    const int error = for_dtype(a.group, a.weight, {a.dy, a.s, a.z, a.dsum, a.dx, a.dz, a.dresidual}, [&]<class E>() {
      return launch<rms_norm_gated_backward_kernel<E>>(grid, block, 0, stream, a, threads, groups);
    });
    if (error) return error;
  }
  const dim3 grid(unsigned((a.dim + 31) / 32));
  return launch<rms_norm_gated_sum_kernel>(grid, dim3(32 * kSlices), 0, stream, a, blocks);
}

}  // namespace pyseq
