// A thread's 4 channels times 4 states in registers: where they come from and go to.
#pragma once
#include "selective_scan/backward.cuh"

namespace pyseq {
namespace {

using Tile = float[4][4];   // [channel][state]

// The thread's part of x [D, N]; zeros where x is null.
__device__ __forceinline__ void load_tile(Tile& to, const float* x, const Place& at, int slice) {
  const int64_t N = at.s.states, n = slice * kSlice + 4 * at.sl;
  const int channels = x ? at.channels - 4 * at.quad : 0, states = N - n < 4 ? int(N - n) : 4;
  const float* p = x + (at.first + 4 * at.quad) * N + n;
#pragma unroll
  for (int c = 0; c < 4; ++c, p += N) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[c][i] = c < channels && i < states ? p[i] : 0.f;
  }
}

__device__ __forceinline__ void store_tile(float* x, const Tile& from, const Place& at, int slice) {
  const int64_t N = at.s.states, n = slice * kSlice + 4 * at.sl;
  const int channels = at.channels - 4 * at.quad, states = N - n < 4 ? int(N - n) : 4;
  float* p = x + (at.first + 4 * at.quad) * N + n;
#pragma unroll
  for (int c = 0; c < 4; ++c, p += N) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c < channels && i < states) p[i] = from[c][i];
  }
}

// exp(delta A) = 2^(delta A log2 e).
__device__ __forceinline__ void load_A(Tile& A, const Place& at, int slice) {
  load_tile(A, at.s.A, at, slice);
#pragma unroll
  for (int i = 0; i < 16; ++i) A[i / 4][i % 4] *= kLog2e;
}

// Row i of a tensor of states [.., D, N], or null.
__device__ __forceinline__ float* states_of(float* x, int64_t i, const Place& at) {
  return x ? x + i * at.s.dim * at.s.states : nullptr;
}
__device__ __forceinline__ const float* states_of(const float* x, int64_t i, const Place& at) {
  return x ? x + i * at.s.dim * at.s.states : nullptr;
}

// The state before token t, where a sequence starts.
__device__ __forceinline__ void load_start(Tile& h, int64_t t, const Place& at, int slice) {
  load_tile(h, states_of(at.s.state, at.sequence.at(t), at), at, slice);
}
// The state before token t, where a chunk begins. Where a sequence starts there, load_start puts its own in its place.
__device__ __forceinline__ void load_checkpoint(Tile& h, int64_t t, const Place& at, int slice) {
  const int64_t i = at.row * checkpoints(at.s.time) + t / kChunk - 1;
  load_tile(h, t > 0 ? states_of(at.s.checkpoints, i, at) : nullptr, at, slice);
}
// The gradient that arrives at the state behind token t - 1, where a sequence ends.
__device__ __forceinline__ void load_end(Tile& g, int64_t t, const Place& at, int slice) {
  load_tile(g, states_of(at.s.dstate_out, at.sequence.at(t - 1), at), at, slice);
}
// Sequences without tokens, between token t - 1 and token t, hand theirs on.
__device__ __forceinline__ void pass_empty(int64_t t, const Place& at, int slice) {
  const Sequences& q = at.sequence;
  const int64_t end = t < at.s.time ? q.at(t) : q.end;
  for (int64_t i = t > 0 ? q.at(t - 1) + 1 : q.begin; at.s.dstate && i < end; ++i) {
    Tile g;
    load_tile(g, states_of(at.s.dstate_out, i, at), at, slice);
    store_tile(states_of(at.s.dstate, i, at), g, at, slice);
  }
}

// [kTileFloats] of the workspace, lane beside lane.
__device__ __forceinline__ void load_own(Tile& to, const float* from) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec<4> x = load_vec<4>(from + 4 * (c * kThreads + threadIdx.x));
#pragma unroll
    for (int n = 0; n < 4; ++n) to[c][n] = x[n];
  }
}
__device__ __forceinline__ void store_own(float* to, const Tile& from) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    store_vec<4>(to + 4 * (c * kThreads + threadIdx.x), Vec<4>{{from[c][0], from[c][1], from[c][2], from[c][3]}});
  }
}

// Where cu_seqlens is not valid: everything that this block would write.
__device__ void fill_nan(const Place& at) {
  const float nan = __int_as_float(0x7fffffff);
  const int64_t token = 2 * at.w.width(), row = at.row * at.w.segments + at.segment;
  float* const slab = at.w.slabs + at.unit * at.s.time * token;
  for (int64_t i = at.begin * token + threadIdx.x; i < at.end * token; i += kThreads) slab[i] = nan;
  if (int(threadIdx.x) >= at.channels) return;
  const int64_t channel = at.first + threadIdx.x;
  for (const View* x : {&at.s.du, &at.s.ddt, &at.s.dz}) {
    const int64_t row_at = at.row * x->stride[0] + channel;
    for (int64_t t = at.begin; *x && t < at.end; ++t) store(*x, row_at + t * x->stride[1], nan);
  }
  const auto fill = [&](float* rows, int64_t i, int64_t size) {
    for (int64_t n = 0; n < size; ++n) rows[(i * at.s.dim + channel) * size + n] = nan;
  };
  fill(at.w.dA, row, at.s.states);
  fill(at.w.dD, row, 1);
  fill(at.w.dbias, row, 1);
  for (int64_t i = 0; at.s.dstate && i < at.s.sequences; ++i) fill(at.s.dstate, i, at.s.states);
}

}  // namespace
}  // namespace pyseq
