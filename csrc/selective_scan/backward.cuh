// What the kernels of the backward share: the cut into tiles, the workspace, and where sequences begin.
//
// A block of 128 threads has 128 channels of one group of one row, a thread 4 channels and 4 states of a slice of 16.
// In warp w, lane = 8 sl + cl: channels 4 (8 w + cl) + {0..3} of the block, states 16 slice + 4 sl + {0..3}. Channels
// and states that do not exist carry zeros. Where rows and channels alone do not fill a GPU, time is cut into segments
// of whole chunks, a block of threads for each.
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

constexpr int kThreads = int(kBlock), kWarps = kThreads / 32, kSlice = 16;
constexpr int kSpan = 8;                        // tokens walked back through at a time
constexpr int kKept = int(kChunk) / kSpan - 1;  // states kept per chunk: before tokens 8, 16, ... 56
constexpr int kTileFloats = kThreads * 16;      // of the tiles of a block
constexpr int64_t kEnoughBlocks = 264;          // two on each of the 132 multiprocessors of an H200

// Bytes from one span of 8 tokens to the next.
struct Strides {
  int64_t u, dt, z, dy, B, C, du, ddt, dz;
};

struct Workspace {
  int64_t blocks, slices, segments, chunks;     // blocks of a group; chunks of 64 tokens in a segment
  int64_t units;                                // B G blocks
  float* slabs;                                 // [units, T, 2, width()]: dB and dC, summed over a block
  float *dA, *dD, *dbias;                       // [B segments, D, N], [B segments, D] twice: summed over the segment
  float* kept;                                  // [units segments, slices, held(), kTileFloats]: h, g, dA
  float* carry;                                 // [units segments, slices, kTileFloats]: exp(delta A) g behind it
  float* decay;                                 // [units segments, 128]: sum of delta; infinite across starts
  int64_t floats;
  Strides span;                                 // of the tensors
  bool vectorised;                              // four channels in one access

  explicit Workspace(const SelectiveScan& s) {
    const int64_t all = (s.time + kChunk - 1) / kChunk;
    blocks = pyseq::blocks(s), slices = (s.states + kSlice - 1) / kSlice, units = s.batch * s.groups * blocks;
    segments = units > 0 ? kEnoughBlocks / units : 1;
    segments = segments > all / 4 ? all / 4 : segments;   // a segment has at least 4 chunks
    segments = segments < 1 ? 1 : segments;
    chunks = (all + segments - 1) / segments;
    segments = chunks > 0 ? (all + chunks - 1) / chunks : 1;
    vectorised = s.dim / s.groups % 4 == 0;
    for (const View* x : {&s.u, &s.dt, &s.z, &s.dy, &s.du, &s.ddt, &s.dz}) {
      vectorised = vectorised && vectorisable(*x, 4, 2);
    }
    const auto bytes = [](const View& x) { return kSpan * x.stride[1] * size_of(x.type); };
    span = {bytes(s.u), bytes(s.dt), bytes(s.z), bytes(s.dy), bytes(s.B), bytes(s.C),
            bytes(s.du), bytes(s.ddt), bytes(s.dz)};
    floats = 0;
    const auto take = [&](int64_t n) {
      float* const p = s.workspace + floats;
      floats += (n + 3) / 4 * 4;
      return p;
    };
    slabs = take(units * s.time * 2 * width());
    dA = take(s.batch * segments * s.dim * s.states);
    dD = take(s.batch * segments * s.dim);
    dbias = take(s.batch * segments * s.dim);
    kept = take(units * segments * slices * held() * kTileFloats);
    carry = take(segments > 1 ? units * segments * slices * kTileFloats : 0);
    decay = take(segments > 1 ? units * segments * kThreads : 0);
  }
  constexpr int64_t width() const { return slices * kSlice; }
  constexpr int64_t held() const { return kKept + (slices > 1 ? 2 : 0); }
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
};

// What a thread works on: the i-th of units times segments, and its share of it.
struct Place {
  const SelectiveScan& s;
  const Workspace& w;
  int64_t unit, segment, row, group, begin, end;   // begin, end: tokens
  int64_t first;                                   // channel of the block
  int channels, warp, lane, quad, sl;              // channels: that exist, of 128; quad: of this thread's channels
  int token, column;                               // of a span of 8 tokens, and 16 columns: what the thread brings in
  Sequences sequence;

  __device__ Place(const SelectiveScan& s_, const Workspace& w_, int64_t i)
      : s(s_), w(w_), unit(i / w.segments), segment(i % w.segments), row(unit / w.blocks / s.groups),
        group(unit / w.blocks % s.groups), begin(segment * w.chunks * kChunk), end(begin + w.chunks * kChunk),
        sequence(s, row) {
    const int64_t per_group = s.dim / s.groups, from = unit % w.blocks * kBlock;
    end = end < s.time ? end : s.time;
    first = group * per_group + from;
    channels = int(per_group - from < kBlock ? per_group - from : kBlock);
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = 8 * warp + lane % 8, sl = lane / 8;
    token = threadIdx.x / 16, column = threadIdx.x % 16;
  }

  // A bit for each of the tokens [t, t + tokens), at most 32, that starts a sequence. Every lane must call.
  __device__ unsigned starts(int64_t t, int tokens) const {
    if (!sequence.of) return t == 0;
    return __ballot_sync(~0u, lane < tokens && sequence.starts(t + lane));
  }
};

}  // namespace
}  // namespace pyseq
