// The gradient within a chunk, given the state before it and G after it.
#include "cuda/opaque.cuh"
#include "ssd/backward_local.cuh"

namespace pyseq {
namespace ssd {
namespace {

// cu_seqlens is not valid: NaN.
__device__ void fill_nan(const Ssd& s, const Where& w) {
  const int64_t heads = w.last - w.first, all = w.chunk.count * heads * s.width;
  for (int64_t i = threadIdx.x; i < all; i += kThreads) {
    const int64_t channel = i % s.width, head = w.first + i / s.width % heads, t = w.chunk.begin + i / s.width / heads;
    for (const View* x : {&s.dx, &s.dz}) {
      if (*x) store(*x, w.chunk.row * x->stride[0] + t * x->stride[1] + head * x->stride[2] + channel, __int_as_float(0x7fffffff));
    }
  }
}

// A chunk without tokens adds nothing to dD.
__device__ void clear_skips(const Ssd& s, const Plan& p, const Where& w) {
  const int64_t each = s.D ? (w.last - w.first) * s.D_width : 0;
  for (int64_t i = threadIdx.x; i < 4 * each; i += kThreads) {
    p.skips[(4 * w.index + i / each) * s.heads * s.D_width + w.first * s.D_width + i % each] = 0.f;
  }
}

template <class Policy>
__global__ void __launch_bounds__(kThreads, 1) ssd_backward_kernel(Ssd s, Plan p) {
  using Here = Local<Policy>;
  constexpr int kWidth = kColumns<Policy>;
  Memory<Policy>& m = *dynamic_smem<Memory<Policy>>();
  if (threadIdx.x == 0) {
    const int blocks = int(p.head_blocks), heads = int(p.group_heads), groups = int(s.groups);
    const int block = blockIdx.x % blocks, group = blockIdx.x / blocks % groups, index = blockIdx.x / blocks / groups;
    const int first = group * heads + block * int(p.heads);
    m.where = {p.chunk(s, index), index, group, block, first, min(first + int(p.heads), (group + 1) * heads)};
  }
  __syncthreads();
  if (m.where.chunk.sequence < 0) return fill_nan(s, m.where);
  if (m.where.chunk.count == 0) return clear_skips(s, p, m.where);
  const int warp = threadIdx.x / 32, width = int(s.width), blocks = int(p.states + kWidth - 1) / kWidth;
  Here at{s, p, m, int(threadIdx.x % 32), warp % 4, warp >= 4, {}, {}};
  at.find_units();
#pragma unroll 1
  for (int n = blocks - 1; n >= 0; --n) {
    __syncthreads();
    at.stage_shared(n * kWidth, true, true);
    __syncthreads();
    at.add_scores(at.E);
  }
  at.keep_scores(at.E);
  at.clear_E();
#pragma unroll 1
  for (int n = 0; n < blocks; ++n) {
    if (n > 0) {
      __syncthreads();
      at.stage_shared(n * kWidth, true, true);
#pragma unroll
      for (int i = 0; i < Here::kTiles * 8; ++i) at.sum[i / 8][i / 4 % 2][i % 4] = 0.f;
    }
#pragma unroll 1
    for (int head = m.where.first; head < m.where.last; ++head) {
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kBlockWidth) {
        __syncthreads();
        at.lane = opaque(at.lane);   // or addresses take registers all along
        at.stage_state(m.S, p.before, head, channel, n * kWidth);
        at.stage_tokens(head, channel, n == 0);
        if (n == 0) {
          Result(&U)[4] = at.E;
          float unit_U = 1.f;
          if (!at.ends) at.clear_E();
#pragma unroll 1
          for (int k = blocks - 1; k >= 0; --k) {
            if (blocks > 1) {
              __syncthreads();
              at.stage_shared(k * kWidth, true, false);
            }
            at.stage_state(m.G, p.after, head, channel, k * kWidth);
            cp_async_wait_all();
            __syncthreads();
            const float unit = at.state_unit(1, head, channel, k * kWidth);
            if (!at.ends) at.add_from_state(U, unit_U / unit);
            unit_U = unit;
          }
          if (at.ends) {
            at.add_E(head, channel == 0);
          } else {
            float dots[2];
            at.row_dots(dots, U, unit_U * m.unit_B * m.unit_x);
            at.add_rows(dots, head, kGBx, channel == 0);
            at.add_from_tokens(U, unit_U);
            at.row_dots(dots, U, at.token_unit() * m.unit_x);
            at.add_rows(dots, head, kUx, channel == 0);
            at.store_dx(U, head, channel);
            if (s.D) at.store_skip(head, channel);
          }
        } else {
          at.stage_state(m.G, p.after, head, channel, n * kWidth);
          cp_async_wait_all();
          __syncthreads();
        }
        const float unit_S = at.state_unit(0, head, channel, n * kWidth), unit_G = at.state_unit(1, head, channel, n * kWidth);
        if (at.ends) at.add_dC(head, unit_S, unit_G, n == 0 && channel == 0);
        else at.add_dB(unit_G);
      }
    }
    at.lane = opaque(at.lane);
    at.store_shared(n * kWidth);
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
  if (s.heads == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.heads, s.width, s.states, s.sequences})
    if (size > ssd::kLongest) return cudaErrorInvalidValue;
  const ssd::Plan p(s);
  const int64_t slabs = s.batch * s.time * s.groups * 2 * p.states;
  const int64_t states = s.sequences * s.heads * p.width_blocks * p.column_blocks();
  for (const int64_t blocks : {p.chunks * s.heads, states, slabs / 1024})
    if (blocks > ssd::kLongest) return cudaErrorInvalidValue;
  if (p.chunks > 0) {
    if (int error = ssd::ssd_backward_steps_cuda(s, stream)) return error;
  }
  if (s.sequences > 0) {
    if (int error = ssd::ssd_backward_states_cuda(s, stream)) return error;
  }
  if (p.chunks > 0) {
    const int error = p.half ? ssd::launch_local<Half>(s, p, stream) : ssd::launch_local<Full>(s, p, stream);
    if (error) return error;
  }
  return ssd::ssd_reduce_cuda(s, stream);
}

}  // namespace pyseq
