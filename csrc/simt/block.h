// One thread block: its threads are fibers that run until they meet others, at a barrier or in a warp collective.
//
// A thread that arrives leaves word where it waits and gives way. The last to arrive completes the meeting (it computes
// the results of all participants) and makes them runnable. When threads wait and none can run, the kernel has
// diverged, and the message tells who waits where.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <source_location>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>                                    // types only

#include "simt/fiber.h"

namespace simt {

constexpr unsigned kMaxThreads = 1024, kWarp = 32, kMaxWarps = kMaxThreads / kWarp;

// Order of threads and of blocks: 0 ascending, 1 descending, n > 1 shuffled with seed n.
struct Order {
  int kind = 0;
  uint64_t random = 1;
  void restart() { random = uint64_t(kind) * 0x9e3779b97f4a7c15u | 1; }
  uint32_t operator()(uint32_t bound) {                          // xorshift*, bound <= 2^32
    random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
    return uint32_t(((random * 0x2545f4914f6cdd1du) >> 32) * bound >> 32);
  }
  template <class Index> void arrange(Index* items, uint32_t n) {
    std::iota(items, items + n, Index(0));
    if (kind == 1) std::reverse(items, items + n);
    for (uint32_t i = n; kind > 1 && i > 1; --i) std::swap(items[i - 1], items[(*this)(i)]);
  }
};

struct Site {                                                    // what a thread waits in
  const char* call;
  uint32_t mask;
  std::source_location where;
  bool operator==(const Site& o) const { return call == o.call && mask == o.mask && where.line() == o.where.line(); }
};

// Completes a warp collective: operand[lane] points into the stack of each lane in `present`.
using Combine = void (*)(uint32_t present, void* const* operand);

struct Meeting { uint32_t mask, arrived; Combine combine; const char* call; };
struct Copy { void* to; const void* code; int bytes; unsigned group; char data[16]; };   // a cp.async in flight
struct Thread {
  Context context;
  uint3 index;
  unsigned rank;
  Site site;
  std::vector<Copy> copies;
  unsigned commits;                                              // of groups of copies
};
struct Lanes { uint32_t of[kMaxWarps]; };                        // a set of threads
struct NamedBarrier { unsigned arrived, expected; Lanes waiting; Site first; };
struct Mbarrier {
  const void* at;
  unsigned count, pending, phase;
  Lanes waiting;
  std::vector<uint32_t> told, known;                             // by all arrivals so far, by those of past phases
};
struct Warp {
  uint32_t alive, runnable;
  unsigned open;
  Meeting meetings[kWarp];
  void* operand[kWarp];
  uint32_t clock[kWarp][kWarp];                                  // [lane][other]: how much of the other it sees
};

struct Block {
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  unsigned num_threads, num_warps, alive, at_barrier;
  uint64_t epoch, first_epoch;                                   // counts barriers, and beginnings of blocks
  Site barrier;
  NamedBarrier named[16];
  std::vector<Mbarrier> mbarriers;
  std::vector<uint32_t> known;                                   // [thread][other], as Warp::clock; empty: not used
  uint8_t warp_order[kMaxWarps];                                 // which warp goes first, while it can
  Order schedule;
  Context scheduler;
  void (*call)(const void* bound);                               // runs the kernel, with the arguments bound to it
  const void* bound;
  std::string error;                                             // empty while all is well
};

inline Block block;
inline Stacks stacks(kMaxThreads);
inline Thread* self;                                             // the running thread; null outside a kernel

struct Position { uint3 thread, block; dim3 threads, blocks; };  // threadIdx, blockIdx, blockDim, gridDim
inline Position position;

inline unsigned lane() { return self->rank % kWarp; }
inline Warp& warp() { return block.warps[self->rank / kWarp]; }

inline std::string describe(const Site& site) {
  std::string text = site.call;
  char mask[32];
  std::snprintf(mask, sizeof mask, "(mask 0x%08x)", site.mask);
  if (site.mask) text += mask;
  const std::string file = site.where.file_name();
  return text + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.where.line());
}

[[noreturn]] inline void stop() { for (;;) switch_to(self->context, block.scheduler); }

// The running thread should have met others, and has not: the launch fails, and no thread of the block is continued.
[[noreturn]] inline void fail(const Site& mine, const Site* others) {
  block.error = "thread " + std::to_string(self->rank) + " is in " + describe(mine);
  block.error += others ? ", others are in " + describe(*others) : ", whose mask leaves it out";
  stop();
}

[[noreturn]] inline void fault(const Site& mine, const std::string& what) {
  block.error = "thread " + std::to_string(self->rank) + " in " + describe(mine) + ": " + what;
  stop();
}
// A meeting of some lanes that takes all: called by the last to arrive, or by one that exits, which waits nowhere.
[[noreturn]] inline void incomplete(uint32_t present) {
  const Thread& waiting = block.threads[self->rank / kWarp * kWarp + std::countr_zero(present)];
  block.error = "thread " + std::to_string(waiting.rank) + " in " + describe(waiting.site);
  block.error += ": lanes of the warp have exited";
  stop();
}

// Told of every access to memory by a kernel, if it was compiled for that: see hooks.h.
enum class Touch { read, write, begin_copy, end_copy };
inline void (*observe)(const void* address, size_t size, Touch, const void* code) = nullptr;
struct Unobserved {                                              // the emulator's own accesses, while one is alive
  static inline bool alive = false;
  Unobserved() { alive = true; }
  ~Unobserved() { alive = false; }
};
inline void (*converged)(unsigned warp) = nullptr;               // all lanes of the warp that are alive have met

inline void wait(const Site& site) {
  self->site = site;
  switch_to(self->context, block.scheduler);
}

inline void release_barrier() {
  block.at_barrier = 0;
  ++block.epoch;
  for (unsigned w = 0; w < block.num_warps; ++w) {
    block.warps[w].runnable = block.warps[w].alive;
    if (converged) converged(w);
  }
  if (block.schedule.kind > 1) block.schedule.arrange(block.warp_order, block.num_warps);
}

inline void sync_block(const Site& site) {
  if (block.at_barrier == 0) block.barrier = site;
  if (site != block.barrier) fail(site, &block.barrier);
  warp().runnable &= ~(1u << lane());
  if (++block.at_barrier == block.alive) release_barrier();
  wait(site);
}

// Threads that have exited are not waited for.
inline void complete_meetings(Warp& w) {
  for (unsigned i = 0; i < w.open;) {
    const Meeting m = w.meetings[i];
    if (m.arrived == (m.mask & w.alive)) {
      m.combine(m.arrived, w.operand);
      if (converged && m.arrived == w.alive) converged(self->rank / kWarp);
      w.runnable |= m.arrived;
      w.meetings[i] = w.meetings[--w.open];
    } else {
      ++i;
    }
  }
}

// All lanes of the mask that have not exited meet here, in the same call; each finds its result in its operand.
inline void meet(const Site& site, Combine combine, void* operand) {
  Warp& w = warp();
  const uint32_t me = 1u << lane();
  if (!(site.mask & me)) fail(site, nullptr);
  Meeting* const end = w.meetings + w.open;
  Meeting* const m = std::find_if(w.meetings, end, [&](const Meeting& open) { return open.mask == site.mask; });
  if (m == end) w.meetings[w.open++] = {site.mask, 0, combine, site.call};
  if (m->combine != combine || m->call != site.call) {
    fail(site, &block.threads[self->rank / kWarp * kWarp + std::countr_zero(m->arrived)].site);
  }
  m->arrived |= me;
  w.operand[lane()] = operand;
  w.runnable &= ~me;
  self->site = site;
  complete_meetings(w);
  wait(site);
}

// What the lanes in `present` know of all threads of the block becomes common.
inline void share_knowledge(uint32_t present) {
  const unsigned n = block.num_threads, first = self->rank / kWarp * kWarp;
  for (unsigned other = 0; other < n; ++other) {
    uint32_t latest = 0;
    for (uint32_t p = present; p; p &= p - 1) {
      latest = std::max(latest, block.known[size_t(first + std::countr_zero(p)) * n + other]);
    }
    for (uint32_t p = present; p; p &= p - 1) block.known[size_t(first + std::countr_zero(p)) * n + other] = latest;
  }
}

// __syncwarp, besides waiting, makes known to all who take part what each of them knows.
inline void order_memory(uint32_t present, void* const*) {
  auto& clock = warp().clock;
  for (unsigned other = 0; other < kWarp; ++other) {
    uint32_t latest = 0;
    for (unsigned i = 0; i < kWarp; ++i) if (present >> i & 1) latest = std::max(latest, clock[i][other]);
    for (unsigned i = 0; i < kWarp; ++i) if (present >> i & 1) clock[i][other] = latest;
  }
  for (unsigned i = 0; i < kWarp; ++i) if (present >> i & 1) ++clock[i][i];
  if (!block.known.empty()) share_knowledge(present);
}

inline void run_thread() {
  fiber_entered(block.scheduler);
  block.call(block.bound);
  if (!self->copies.empty()) {
    block.error = "thread " + std::to_string(self->rank) + " exits with " + std::to_string(self->copies.size()) +
                  " cp.async that it did not wait for";
    stop();
  }
  Warp& w = warp();
  w.alive &= ~(1u << lane()), w.runnable &= ~(1u << lane());
  --block.alive;
  if (block.at_barrier && block.at_barrier == block.alive) release_barrier();
  complete_meetings(w);
  stop();
}

// A warp runs as far as it can before the next one does: a missing barrier then shows.
inline Thread* next_thread() {
  for (unsigned i = 0; i < block.num_warps; ++i) {
    const unsigned w = block.warp_order[i];
    const uint32_t runnable = block.warps[w].runnable;
    if (!runnable) continue;
    const int turn = block.schedule.kind > 1 ? int(block.schedule(kWarp)) : 0;
    const int lane = block.schedule.kind == 1 ? 31 - std::countl_zero(runnable)
                                              : (std::countr_zero(std::rotr(runnable, turn)) + turn) % int(kWarp);
    return &block.threads[w * kWarp + lane];
  }
  return nullptr;
}

inline std::string divergence() {
  std::string text = "divergence, no thread can go on:";
  for (unsigned w = 0, groups = 0; w < block.num_warps && groups < 4; ++w) {
    for (uint32_t left = block.warps[w].alive; left && groups < 4; ++groups) {
      const Site& site = block.threads[w * kWarp + std::countr_zero(left)].site;
      uint32_t same = 0;
      for (uint32_t rest = left; rest; rest &= rest - 1) {
        const unsigned lane = std::countr_zero(rest);
        if (block.threads[w * kWarp + lane].site == site) same |= 1u << lane;
      }
      char lanes[64];
      std::snprintf(lanes, sizeof lanes, "%s lanes 0x%08x of warp %u wait in ", groups ? ";" : "", same, w);
      text += lanes + describe(site);
      left &= ~same;
    }
  }
  return text;
}

// Runs the block at position.block. Returns false, with the reason in block.error, if the kernel is at fault.
inline bool run_block() {
  const dim3 size = position.threads;
  const unsigned n = size.x * size.y * size.z;
  block.num_threads = block.alive = n, block.num_warps = (n + kWarp - 1) / kWarp, block.at_barrier = 0;
  block.first_epoch = ++block.epoch;
  for (NamedBarrier& b : block.named) b = {};
  block.mbarriers.clear(), block.known.clear();
  for (unsigned w = 0; w < block.num_warps; ++w) {
    const unsigned lanes = std::min(n - w * kWarp, kWarp);
    block.warps[w].alive = block.warps[w].runnable = ~0u >> (kWarp - lanes), block.warps[w].open = 0;
    std::memset(block.warps[w].clock, 0, sizeof block.warps[w].clock);
    for (unsigned i = 0; i < kWarp; ++i) block.warps[w].clock[i][i] = 1;
  }
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = block.threads[i];
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)}, t.rank = i;
    t.copies.clear(), t.commits = 0;
    stacks.start(t.context, i, run_thread);
  }
  block.schedule.arrange(block.warp_order, block.num_warps);
  while (block.alive && block.error.empty()) {
    self = next_thread();
    if (!self) {
      block.error = divergence();
      break;
    }
    position.thread = self->index;
    switch_to(block.scheduler, self->context);
    self = nullptr, Unobserved::alive = false;
  }
  for (unsigned w = 0; converged && w < block.num_warps; ++w) converged(w);
  return block.error.empty();
}

}  // namespace simt
