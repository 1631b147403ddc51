// mma and ldmatrix, their fragments filled and read as the PTX manual numbers them: element i of a lane, its row and
// column by groupID and threadID_in_group.
#include <cstdint>
#include <cstring>

#include "cuda/mma.cuh"

namespace pyseq {
namespace {

// d = c + a b for one tile, matrices row by row. `swapped` is a fault: the middle registers of A change places.
template <class T, class D>
__global__ void mma_kernel(const T* a, const T* b, const D* c, D* d, bool swapped) {
  constexpr int kEach = 4 / sizeof(T), K = 8 * kEach;
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  T of_a[4 * kEach], of_b[2 * kEach];
  for (int i = 0; i < 4 * kEach; ++i) {
    const bool upper = i < kEach || (i >= 2 * kEach && i < 3 * kEach);
    const int row = upper ? group : group + 8;
    const int column = in_group * kEach + i % kEach + (i < 2 * kEach ? 0 : 4 * kEach);
    of_a[i] = a[row * K + column];
  }
  for (int i = 0; i < 2 * kEach; ++i) {
    const int row = in_group * kEach + i % kEach + (i < kEach ? 0 : 4 * kEach);
    of_b[i] = b[row * 8 + group];
  }
  unsigned ra[4], rb[2];
  memcpy(ra, static_cast<const void*>(of_a), sizeof ra), memcpy(rb, static_cast<const void*>(of_b), sizeof rb);
  if (swapped) {
    const unsigned one = ra[1];
    ra[1] = ra[2], ra[2] = one;
  }
  D sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2];
  mma<T>(sum, ra, rb);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2] = sum[i];
}

// Registers of every lane, of matrices stored in rows `stride` elements apart, `shift` elements after an aligned
// address.
template <int n, bool transposed>
__global__ void ldmatrix_kernel(const uint16_t* x, unsigned* out, int stride, int shift) {
  uint16_t* const tile = dynamic_smem<uint16_t>() + shift;
  for (int i = threadIdx.x; i < 8 * n * 8; i += 32) tile[i / 8 * stride + i % 8] = x[i];
  __syncwarp();
  unsigned r[n];
  ldmatrix<n, transposed>(r, tile + (threadIdx.x % (8 * n)) * stride);
  for (int i = 0; i < n; ++i) out[threadIdx.x * n + i] = r[i];
}

// y [16, 8] = x [16, 16] w, with w stored as [8, 16] or, transposed, as [16, 8]: how a kernel feeds mma.
template <bool transposed>
__global__ void __launch_bounds__(32) tile_product_kernel(const __nv_bfloat16* x, const __nv_bfloat16* w, float* y) {
  constexpr int kStride = 24;                                    // rows of 48 bytes: eight of them need every bank once
  __shared__ __align__(16) __nv_bfloat16 xs[16 * kStride], ws[16 * kStride];
  const int lane = threadIdx.x, width = transposed ? 8 : 16;
  for (int i = lane; i < 256; i += 32) xs[i / 16 * kStride + i % 16] = x[i];
  for (int i = lane; i < 128; i += 32) ws[i / width * kStride + i % width] = w[i];
  __syncwarp();
  unsigned a[4], b[2];
  float d[4] = {};
  ldmatrix<4>(a, xs + lane % 16 * kStride + lane / 16 * 8);
  ldmatrix<2, transposed>(b, transposed ? ws + lane % 16 * kStride : ws + lane % 8 * kStride + lane / 8 % 2 * 8);
  mma<__nv_bfloat16>(d, a, b);
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Half of the warp has gone when the other half multiplies.
__global__ void half_mma_kernel(float* y) {
  if (threadIdx.x >= 16) return;
  const unsigned a[4] = {}, b[2] = {};
  float d[4] = {};
  mma<__half>(d, a, b);
  y[threadIdx.x] = d[0];
}

template <class T, class D> int product(const void* a, const void* b, const D* c, D* d, int swapped) {
  return launch<mma_kernel<T, D>>(1, 32, 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), c, d,
                                  swapped != 0);
}
template <int n> int load_matrices(const uint16_t* x, unsigned* out, int stride, int shift, int transposed) {
  const size_t bytes = 2 * (8 * n * stride + 8 + shift);
  return transposed ? launch<ldmatrix_kernel<n, true>>(1, 32, bytes, nullptr, x, out, stride, shift)
                    : launch<ldmatrix_kernel<n, false>>(1, 32, bytes, nullptr, x, out, stride, shift);
}

}  // namespace
}  // namespace pyseq

#pragma GCC visibility push(default)
extern "C" {
int mma_bf16(const void* a, const void* b, const float* c, float* d, int swapped) {
  return pyseq::product<__nv_bfloat16>(a, b, c, d, swapped);
}
int mma_fp16(const void* a, const void* b, const float* c, float* d, int swapped) {
  return pyseq::product<__half>(a, b, c, d, swapped);
}
int mma_tf32(const void* a, const void* b, const float* c, float* d, int swapped) {
  return pyseq::product<float>(a, b, c, d, swapped);
}
int mma_int8(const void* a, const void* b, const int* c, int* d, int swapped) {
  return pyseq::product<int8_t>(a, b, c, d, swapped);
}
int ldmatrix_1(const uint16_t* x, unsigned* out, int stride, int shift, int transposed) {
  return pyseq::load_matrices<1>(x, out, stride, shift, transposed);
}
int ldmatrix_2(const uint16_t* x, unsigned* out, int stride, int shift, int transposed) {
  return pyseq::load_matrices<2>(x, out, stride, shift, transposed);
}
int ldmatrix_4(const uint16_t* x, unsigned* out, int stride, int shift, int transposed) {
  return pyseq::load_matrices<4>(x, out, stride, shift, transposed);
}
int tile_product(const void* x, const void* w, float* y, int transposed) {
  const auto *px = static_cast<const __nv_bfloat16*>(x), *pw = static_cast<const __nv_bfloat16*>(w);
  return transposed ? pyseq::launch<pyseq::tile_product_kernel<true>>(1, 32, 0, nullptr, px, pw, y)
                    : pyseq::launch<pyseq::tile_product_kernel<false>>(1, 32, 0, nullptr, px, pw, y);
}
int half_mma(float* y) { return pyseq::launch<pyseq::half_mma_kernel>(1, 32, 0, nullptr, y); }
}
#pragma GCC visibility pop
