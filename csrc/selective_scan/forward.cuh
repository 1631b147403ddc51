// How the forward cuts its work, and what lies where in the shared memory of a warp.
#pragma once
#include "selective_scan/update.cuh"

namespace pyseq {

// Between two passes over the chunks of a row: states [B, splits, D, N] holds what each chunk ends with had it begun with
// zeros, and then what it begins with. steps [B, splits, D]: the sum of delta over a chunk.
int selective_scan_carry_cuda(const SelectiveScan&, int splits, int chunk, float* states, const float* steps, void* stream);

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;   // the warps of a block do not wait for each other

template <int L> constexpr int kTokens = L < 4 ? 4 * L : 16;             // brought in at a time
template <int L> constexpr int kRows = kTokens<L> * kTileChannels<L>;     // elements of u in so many tokens
template <int L> constexpr int kShared = kTokens<L> * kTileStates<L>;     // elements of B
template <int L> constexpr bool kSlices = L == 16;                        // there may be more slices than one

// A tensor on its way in: how it is read, and where its elements wait, in bytes from the beginning of a warp's memory.
struct Stream {
  View x;
  bool wide;       // 4 elements at a time
  int raw, stage;  // stage: bytes between the two places of what is needed once more when its tokens are done
};

// What a warp walks, and how many elements precede its first token in dt, u and z, in B and C, and in y.
struct Walk {
  Tile tile;
  int row;
  int64_t rows[3], shared[2], y;
};
static_assert(sizeof(Walk) == 64);

// Shared memory of a warp begins with its Walk, since registers are scarce, and floats: delta, du and y of a tile of tokens,
// B and C. y takes the place of du, unless slices follow that need it.
template <int L> struct Floats {
  static constexpr int kDelta = sizeof(Walk) / 4, kDu = kDelta + kRows<L>, kY = kSlices<L> ? kDu + kRows<L> : kDu,
                       kB = kY + kRows<L>, kC = kB + kShared<L>, kEnd = kC + kShared<L>;
};

// Then come the streams. dt, B and C are converted before the next tile is asked for, so they wait in one place; u and z
// have two.
struct Layout {
  Stream rows[3];     // dt, u, z
  Stream shared[2];   // B, C
  bool wide_y;
  int bytes;
};

template <int L> Layout layout(const SelectiveScan& s) {
  Layout at{};
  at.bytes = Floats<L>::kEnd * 4;
  const auto take = [&](int64_t bytes) {
    const int begin = at.bytes;
    at.bytes += int(bytes);
    return begin;
  };
  const bool aligned = s.groups == 1 || s.dim / s.groups % 4 == 0;   // the first channel of every group
  const auto rows = [&](const View& x, int stages) {
    const int bytes = kRows<L> * int(size_of(x.type)), raw = x ? take(stages * bytes) : 0;
    return Stream{x, aligned && vectorisable(x, 4, 2), raw, stages > 1 ? bytes : 0};
  };
  const auto shared = [&](const View& x) {
    return Stream{x, vectorisable(x, 4, 3), take(kShared<L> * size_of(x.type)), 0};
  };
  at.rows[0] = rows(s.dt, 1);
  at.rows[1] = rows(s.u, 2);
  at.rows[2] = rows(s.z, 2);
  at.shared[0] = shared(s.B);
  at.shared[1] = shared(s.C);
  at.wide_y = aligned && vectorisable(s.y, 4, 2);
  return at;
}

struct Plan {
  int tiles, slices;   // of a row; of the states
  int splits, chunk;   // chunks of a row, and their tokens: never 0, since chunks are counted by it
  float* states;       // [B, splits, D, N]: what chunks end and begin with, and the slices that wait
  float* steps;        // [B, splits, D]
  Layout layout;
};

// 2112 warps are four for each of the 528 schedulers of an H200. A split row computes every exponential twice, so rows are
// cut only where there is less than one warp for each. Chunks have 256 tokens at least.
inline int64_t splits_of(int64_t warps, int64_t time) {
  constexpr int64_t kWarpsWanted = 2112, kTokensAtLeast = 256;
  const int64_t wanted = warps == 0 || warps * 4 >= kWarpsWanted ? 1 : (kWarpsWanted + warps - 1) / warps;
  const int64_t most = time / kTokensAtLeast;
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

template <int L> Plan plan(const SelectiveScan& s) {
  Plan p{};
  p.tiles = int(s.groups) * tiles_of_group<L>(int(s.dim / s.groups));
  p.slices = int((s.states + kTileStates<L> - 1) / kTileStates<L>);
  const int64_t piece = splits_of(s.batch * p.tiles, s.time) * kChunk, chunk = (s.time + piece - 1) / piece * kChunk;
  p.chunk = int(s.time ? chunk : kChunk);
  p.splits = s.time ? int((s.time + chunk - 1) / chunk) : 1;
  p.layout = layout<L>(s);
  return p;
}

}  // namespace
}  // namespace pyseq
