// The gradient within a chunk, given the state before it and G after it.
#include "ssd/backward_local.cuh"

namespace pyseq {
namespace ssd {
namespace {

// cu_seqlens is not valid: NaN.
__device__ void fill_nan(const Ssd& s, const Chunk& chunk, int64_t first, int64_t last) {
  const int64_t heads = last - first, all = chunk.count * heads * s.width;
  for (int64_t i = threadIdx.x; i < all; i += kThreads) {
    const int64_t channel = i % s.width, head = first + i / s.width % heads, t = chunk.begin + i / s.width / heads;
    for (const View* x : {&s.dx, &s.dz}) {
      if (*x) store(*x, chunk.row * x->stride[0] + t * x->stride[1] + head * x->stride[2] + channel, __int_as_float(0x7fffffff));
    }
  }
}

__device__ void clear_skips(const Ssd& s, const Plan& p, int64_t index, int64_t first, int64_t last) {
  for (int64_t i = threadIdx.x; s.D && i < 4 * (last - first) * s.D_width; i += kThreads) {
    const int64_t each = (last - first) * s.D_width;
    p.skips[(4 * index + i / each) * s.heads * s.D_width + first * s.D_width + i % each] = 0.f;
  }
}

template <class Policy>
__global__ void __launch_bounds__(kThreads, 1) ssd_backward_kernel(Ssd s, Plan p) {
  using Here = Local<Policy>;
  constexpr int kWidth = kColumns<Policy>;
  const int64_t block = blockIdx.x % p.head_blocks, group = blockIdx.x / p.head_blocks % s.groups;
  const int64_t index = blockIdx.x / p.head_blocks / s.groups;
  const int64_t end = (group + 1) * p.group_heads, first = group * p.group_heads + block * p.heads;
  const int64_t last = first + p.heads < end ? first + p.heads : end;
  const int warp = threadIdx.x / 32;
  Here at{s, p, *dynamic_smem<Memory<Policy>>(), p.chunk(s, index), index, group, first,
          int(threadIdx.x % 32), warp % 4, warp >= 4, 1.f, 1.f, 1.f, 1.f, {}, {}, {}};
  if (at.chunk.sequence < 0) return fill_nan(s, at.chunk, first, last);
  if (at.chunk.count == 0) return clear_skips(s, p, index, first, last);
  const int64_t blocks = (p.states + kWidth - 1) / kWidth;
  at.find_units();
#pragma unroll 1
  for (int64_t n = blocks - 1; n >= 0; --n) {
    __syncthreads();
    at.stage_shared(n * kWidth, true, true);
    __syncthreads();
    at.add_scores();
  }
#pragma unroll 1
  for (int64_t n = 0; n < blocks; ++n) {
    if (n > 0) {
      __syncthreads();
      at.stage_shared(n * kWidth, true, true);
#pragma unroll
      for (int i = 0; i < Here::kTiles * 8; ++i) at.sum[i / 8][i / 4 % 2][i % 4] = 0.f;
    }
#pragma unroll 1
    for (int64_t head = first; head < last; ++head) {
#pragma unroll 1
      for (int64_t channel = 0; channel < s.width; channel += kBlockWidth) {
        __syncthreads();
        at.stage_tokens(head, channel, n == 0);
        at.stage_state(at.m.S, p.before, head, channel, n * kWidth);
        if (n == 0) {
          Result(&U)[4] = at.E;
          if (!at.ends) {
#pragma unroll
            for (int i = 0; i < 32; ++i) U[i / 8][i / 4 % 2][i % 4] = 0.f;
          }
#pragma unroll 1
          for (int64_t k = blocks - 1; k >= 0; --k) {
            if (blocks > 1) {
              __syncthreads();
              at.stage_shared(k * kWidth, true, false);
            }
            at.stage_state(at.m.G, p.after, head, channel, k * kWidth);
            __syncthreads();
            if (!at.ends) at.add_from_state(U, at.state_unit(1, head, channel, k * kWidth));
          }
          if (at.ends) {
            at.add_E(head, channel == 0);
          } else {
            float dots[2];
            at.row_dots(dots, U, at.unit_B * at.unit_x);
            at.add_rows(dots, head, kGBx, channel == 0);
            at.add_from_tokens(U);
            at.row_dots(dots, U, at.token_unit() * at.unit_x);
            at.add_rows(dots, head, kUx, channel == 0);
            at.store_dx(U, head, channel);
            if (s.D) at.store_skip(head, channel);
          }
        } else {
          at.stage_state(at.m.G, p.after, head, channel, n * kWidth);
          __syncthreads();
        }
        const float unit_S = at.state_unit(0, head, channel, n * kWidth), unit_G = at.state_unit(1, head, channel, n * kWidth);
        if (at.ends) at.add_dC(head, unit_S, unit_G, n == 0 && channel == 0);
        else at.add_dB(unit_G);
      }
    }
    at.store_shared(block, n * kWidth);
  }
}

template <class Policy> int launch_local(const Ssd& s, const Plan& p, void* stream) {
  const dim3 grid(unsigned(p.chunks * s.groups * p.head_blocks));
  return launch<ssd_backward_kernel<Policy>>(grid, dim3(kThreads), sizeof(Memory<Policy>), stream, s, p);
}

}  // namespace
}  // namespace ssd

int64_t ssd_backward_workspace(const Ssd& s) { return ssd::Plan(s).floats; }

int ssd_backward_cuda(const Ssd& s, void* stream) {
  const ssd::Plan p(s);
  if (s.heads == 0) return 0;
  if (p.chunks > 0) {
    if (int error = ssd::ssd_backward_steps_cuda(s, stream)) return error;
  }
  if (s.sequences > 0) {
    if (int error = ssd::ssd_backward_states_cuda(s, stream)) return error;
  }
  if (p.chunks > 0) {
    const int error = p.half ? ssd::launch_local<ssd::Half>(s, p, stream) : ssd::launch_local<ssd::Full>(s, p, stream);
    if (error) return error;
  }
  return ssd::ssd_reduce_cuda(s, stream);
}

}  // namespace pyseq
