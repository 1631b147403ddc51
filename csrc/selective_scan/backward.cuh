// What the kernels of the backward share: the cut into tiles, the workspace, and where sequences begin.
//
// A block of 128 threads has 128 channels of one group of one row; a thread has 4 channels and 4 states of a slice of 16.
// With lane = 8 sl + cl, warp w: channels 4 (8 w + cl) + {0..3} of the block, states 16 slice + 4 sl + {0..3}. Channels and
// states that do not exist carry zeros. Time is cut into segments of whole chunks, a block of threads each, where rows and
// channels alone do not fill a GPU.
#pragma once
#include "cuda/device.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "selective_scan/kernel.h"

namespace pyseq {

// The first and the last part of selective_scan_backward_cuda; the first only where there is more than one segment.
int selective_scan_backward_carry_cuda(const SelectiveScan&, void* stream);
int selective_scan_reduce_cuda(const SelectiveScan&, void* stream);

namespace {

constexpr int kThreads = int(kBlock), kSpan = 8, kSlice = 16, kQuads = kThreads / 4, kWarps = kThreads / 32;
constexpr int kTile = kThreads * 16;             // floats of the tiles of a block
constexpr int kKept = int(kChunk) / kSpan - 1;   // states kept per chunk: before tokens 8, 16, ... 56
constexpr int64_t kEnough = 264;                 // blocks that fill the largest GPU this was written for, two to each of 132 SMs

struct Workspace {
  int64_t blocks, slices, segments, chunks;      // blocks of a group; chunks of 64 tokens in a segment
  int64_t units;                                 // B G blocks
  float* slabs;                                  // [units, T, 2, 16 slices]: dB and dC summed over the channels of a block
  float *dA, *dD, *dbias;                        // [B segments, D, N], [B segments, D] twice: sums over the tokens of a segment
  float* kept;                                   // [units segments, slices, kKept (+ 2), kTile]: h; past one slice also g and dA
  float* carry;                                  // [units segments, slices, kTile]: exp(delta A) g behind a segment
  float* decay;                                  // [units segments, kThreads]: sum of delta over a segment, infinite where a sequence begins in or behind it
  int64_t floats;
  bool vectorised;                               // four channels in one access

  explicit Workspace(const SelectiveScan& s) {
    const int64_t all = (s.time + kChunk - 1) / kChunk;
    blocks = pyseq::blocks(s), slices = (s.states + kSlice - 1) / kSlice, units = s.batch * s.groups * blocks;
    segments = units > 0 ? kEnough / units : 1;
    segments = segments > all / 4 ? all / 4 : segments;   // a segment has at least 4 chunks
    segments = segments < 1 ? 1 : segments;
    chunks = (all + segments - 1) / segments;
    segments = chunks > 0 ? (all + chunks - 1) / chunks : 1;
    vectorised = s.groups > 0 && s.dim / s.groups % 4 == 0;
    for (const View* x : {&s.u, &s.dt, &s.z, &s.dy, &s.du, &s.ddt, &s.dz}) vectorised = vectorised && vectorisable(*x, 4, 2);
    floats = 0;
    const auto take = [&](int64_t n) {
      float* const p = s.workspace + floats;
      floats += (n + 3) / 4 * 4;
      return p;
    };
    slabs = take(units * s.time * 2 * slices * kSlice);
    dA = take(s.batch * segments * s.dim * s.states);
    dD = take(s.batch * segments * s.dim);
    dbias = take(s.batch * segments * s.dim);
    kept = take(units * segments * slices * held() * kTile);
    carry = take(segments > 1 ? units * segments * slices * kTile : 0);
    decay = take(segments > 1 ? units * segments * kThreads : 0);
  }
  constexpr int64_t held() const { return kKept + (slices > 1 ? 2 : 0); }
};

struct Place {
  int64_t row, group, unit, segment;
  int64_t begin, end;                            // tokens
  int64_t first;                                 // channel of the block
  int channels, warp, lane, quad, sl;            // channels: that exist, of 128; quad: of this thread's channels

  __device__ Place(const SelectiveScan& s, const Workspace& w, int64_t i) {   // the i-th of units segments
    unit = i / w.segments, segment = i % w.segments;
    const int64_t per_group = s.dim / s.groups, block = unit % w.blocks;
    row = unit / w.blocks / s.groups, group = unit / w.blocks % s.groups;
    begin = segment * w.chunks * kChunk, end = begin + w.chunks * kChunk;
    end = end < s.time ? end : s.time;
    first = group * per_group + block * kBlock;
    channels = int(per_group - block * kBlock < kBlock ? per_group - block * kBlock : kBlock);
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = 8 * warp + lane % 8, sl = lane / 8;
  }
};

// Which sequence a token is in. Sequences without tokens lie between those of neighbouring tokens.
struct Sequences {
  const int32_t* of;
  int64_t row, time, begin, end;

  __device__ Sequences(const SelectiveScan& s, int64_t row_)
      : of(s.sequence_of), row(row_), time(s.time), begin(of ? 0 : row), end(of ? s.sequences : row + 1) {}
  __device__ bool invalid() const { return of && of[0] < 0; }
  __device__ int64_t at(int64_t t) const { return of ? of[t] : row; }
  __device__ bool starts(int64_t t) const { return t == 0 || (of && of[t] != of[t - 1]); }
  // A bit for each of the tokens [t, t + tokens), at most 32, that starts a sequence. Every lane must call.
  __device__ unsigned starts(int64_t t, int tokens, int lane) const {
    return __ballot_sync(~0u, lane < tokens && starts(t + lane));
  }
};

// Elements as they lie in memory: a load is not waited for before its bits become floats.
__device__ __forceinline__ unsigned load_bits(const View& x, int64_t i) {
  return x.type == DType::f32 ? static_cast<const unsigned*>(x.data)[i] : static_cast<const unsigned short*>(x.data)[i];
}
__device__ __forceinline__ float as_float(unsigned bits, DType type) {
  if (type == DType::f32) return __uint_as_float(bits);
  if (type == DType::bf16) return __uint_as_float(bits << 16);
  const unsigned short half = static_cast<unsigned short>(bits);
  return load(reinterpret_cast<const __half*>(&half));
}

// Four neighbours; those beyond `count`, and all of an absent tensor, are zero. 16-bit elements lie in x and y.
struct Quad {
  unsigned x, y, z, w;
};
__device__ __forceinline__ Quad load_quad(const View& v, int64_t i, bool vectorised, int count) {
  if (!v || count <= 0) return {};
  if (v.type == DType::f32) {
    const unsigned* const p = static_cast<const unsigned*>(v.data) + i;
    if (!vectorised) return {p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0};
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    return {bits.x, bits.y, bits.z, bits.w};
  }
  const unsigned short* const p = static_cast<const unsigned short*>(v.data) + i;
  if (vectorised) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    return {bits.x, bits.y, 0, 0};
  }
  const unsigned p1 = count > 1 ? p[1] : 0, p2 = count > 2 ? p[2] : 0, p3 = count > 3 ? p[3] : 0;
  return {p[0] | p1 << 16, p2 | p3 << 16, 0, 0};
}
__device__ __forceinline__ Vec<4> floats(const Quad& q, DType type) {
  if (type == DType::f32) return {{__uint_as_float(q.x), __uint_as_float(q.y), __uint_as_float(q.z), __uint_as_float(q.w)}};
  return {{as_float(q.x & 0xffff, type), as_float(q.x >> 16, type), as_float(q.y & 0xffff, type), as_float(q.y >> 16, type)}};
}

// The thread's part of x [D, N]; zeros where x is null.
__device__ __forceinline__ void load_tile(float (&to)[4][4], const float* x, const SelectiveScan& s, const Place& at, int slice) {
  const int64_t n = slice * kSlice + 4 * at.sl;
  const int channels = x ? at.channels - 4 * at.quad : 0, states = s.states - n < 4 ? int(s.states - n) : 4;
  const float* p = x + (at.first + 4 * at.quad) * s.states + n;
#pragma unroll
  for (int c = 0; c < 4; ++c, p += s.states) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[c][i] = c < channels && i < states ? p[i] : 0.f;
  }
}
__device__ __forceinline__ void store_tile(float* x, const float (&from)[4][4], const SelectiveScan& s, const Place& at, int slice) {
  const int64_t n = slice * kSlice + 4 * at.sl;
  const int channels = at.channels - 4 * at.quad, states = s.states - n < 4 ? int(s.states - n) : 4;
  float* p = x + (at.first + 4 * at.quad) * s.states + n;
#pragma unroll
  for (int c = 0; c < 4; ++c, p += s.states) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c < channels && i < states) p[i] = from[c][i];
  }
}
__device__ __forceinline__ void load_decay(float (&A)[4][4], const SelectiveScan& s, const Place& at, int slice) {
  load_tile(A, s.A, s, at, slice);
#pragma unroll
  for (int i = 0; i < 16; ++i) A[i / 4][i % 4] *= kLog2e;   // exp(delta A) = 2^(delta A log2 e)
}

// [kTile] of the workspace, lane beside lane.
__device__ __forceinline__ void load_own(float (&to)[4][4], const float* from) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Vec<4> x = load_vec<4>(from + 4 * (c * kThreads + threadIdx.x));
#pragma unroll
    for (int n = 0; n < 4; ++n) to[c][n] = x[n];
  }
}
__device__ __forceinline__ void store_own(float* to, const float (&from)[4][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    store_vec<4>(to + 4 * (c * kThreads + threadIdx.x), Vec<4>{{from[c][0], from[c][1], from[c][2], from[c][3]}});
  }
}

// The gradient that arrives at the state behind token t - 1, where a sequence ends.
__device__ __forceinline__ void load_end(float (&x)[4][4], const Sequences& q, int64_t t, const SelectiveScan& s,
                                         const Place& at, int slice) {
  load_tile(x, s.dstate_out ? s.dstate_out + q.at(t - 1) * s.dim * s.states : nullptr, s, at, slice);
}
// Sequences without tokens, between token t - 1 and token t, hand theirs on.
__device__ __forceinline__ void pass_empty(const Sequences& q, int64_t t, const SelectiveScan& s, const Place& at, int slice) {
  const int64_t size = s.dim * s.states, end = t < q.time ? q.at(t) : q.end;
  for (int64_t i = t > 0 ? q.at(t - 1) + 1 : q.begin; s.dstate && i < end; ++i) {
    float x[4][4];
    load_tile(x, s.dstate_out ? s.dstate_out + i * size : nullptr, s, at, slice);
    store_tile(s.dstate + i * size, x, s, at, slice);
  }
}

// The state before token t of a chunk that begins there; at the start of a sequence it is replaced.
__device__ __forceinline__ void load_checkpoint(float (&h)[4][4], const SelectiveScan& s, const Place& at, int64_t t, int slice) {
  const int64_t i = at.row * checkpoints(s.time) + t / kChunk - 1;
  load_tile(h, t > 0 ? s.checkpoints + i * s.dim * s.states : nullptr, s, at, slice);
}

// Where cu_seqlens is not valid, everything that this block would write.
__device__ void fill_nan(const SelectiveScan& s, const Workspace& w, const Place& at, float* slab) {
  const float nan = __int_as_float(0x7fffffff);
  const int64_t width = 2 * w.slices * kSlice, row = at.row * w.segments + at.segment;
  for (int64_t i = at.begin * width + threadIdx.x; i < at.end * width; i += kThreads) slab[i] = nan;
  if (int(threadIdx.x) >= at.channels) return;
  const int64_t channel = at.first + threadIdx.x;
  for (const View* x : {&s.du, &s.ddt, &s.dz}) {
    for (int64_t t = at.begin; *x && t < at.end; ++t) store(*x, at.row * x->stride[0] + t * x->stride[1] + channel, nan);
  }
  const auto fill = [&](float* rows, int64_t i, int64_t size) {
    for (int64_t n = 0; n < size; ++n) rows[(i * s.dim + channel) * size + n] = nan;
  };
  fill(w.dA, row, s.states);
  fill(w.dD, row, 1);
  fill(w.dbias, row, 1);
  for (int64_t i = 0; s.dstate && i < s.sequences; ++i) fill(s.dstate, i, s.states);
}

}  // namespace
}  // namespace pyseq
