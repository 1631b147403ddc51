// Barriers for some of a block's threads: bar.sync with a number and a count, and mbarrier in shared memory.
//
// Modelled: who waits for whom, and what that orders (races.h): all that a thread did before it arrived is known to
// those that its arrival lets go on. A wait that nobody ends is reported as divergence. Checked: numbers and counts,
// that an mbarrier was initialised, that no more threads arrive than it expects. Not modelled: transactions
// (expect_tx).
#pragma once
#include "simt/block.h"
#include "simt/shared_memory.h"
#include "simt/warp.h"

namespace simt {

inline void park(Lanes& waiting, const Site& site) {
  const uint32_t me = 1u << lane();
  waiting.of[self->rank / kWarp] |= me;
  warp().runnable &= ~me;
  wait(site);
}

inline void wake(Lanes& waiting) {
  for (unsigned w = 0; w < block.num_warps; ++w) block.warps[w].runnable |= waiting.of[w];
  waiting = {};
}

// `told` learns all that `thread` knows, and `thread` begins a new stretch of time that it does not know of.
[[gnu::no_sanitize("thread")]] inline void tell(std::vector<uint32_t>& told, unsigned thread) {
  const unsigned n = block.num_threads, first = thread / kWarp * kWarp;
  if (block.known.empty()) block.known.resize(size_t(n) * n);
  told.resize(n);
  const uint32_t* const known = block.known.data() + size_t(thread) * n;
  for (unsigned other = 0; other < n; ++other) told[other] = std::max(told[other], known[other]);
  auto& clock = block.warps[thread / kWarp].clock[thread % kWarp];
  for (unsigned i = first; i < std::min(n, first + kWarp); ++i) told[i] = std::max(told[i], clock[i - first]);
  ++clock[thread % kWarp];
}

[[gnu::no_sanitize("thread")]] inline void learn(unsigned thread, const std::vector<uint32_t>& told) {
  uint32_t* const known = block.known.data() + size_t(thread) * block.num_threads;
  for (unsigned other = 0; other < block.num_threads; ++other) known[other] = std::max(known[other], told[other]);
}

// bar.sync id, threads
inline void named_barrier(int id, int threads, Where where = Where::current()) {
  const Site site{__func__, 0, where};
  if (id < 1 || id > 15) fault(site, "barrier " + std::to_string(id) + " of 1..15");
  if (threads < 1 || threads % kWarp || unsigned(threads) > block.num_threads) {
    fault(site, std::to_string(threads) + " threads are no multiple of a warp, or more than the block has");
  }
  NamedBarrier& b = block.named[id];
  if (b.arrived == 0) b.expected = threads, b.first = site;
  if (b.expected != unsigned(threads)) fail(site, &b.first);
  if (++b.arrived < b.expected) return park(b.waiting, site);
  const Unobserved own;
  b.waiting.of[self->rank / kWarp] |= 1u << lane();
  std::vector<uint32_t> told;
  const auto each = [&](auto f) {
    for (unsigned i = 0; i < block.num_threads; ++i) if (b.waiting.of[i / kWarp] >> i % kWarp & 1) f(i);
  };
  each([&](unsigned i) { tell(told, i); });
  each([&](unsigned i) { learn(i, told); });
  b.arrived = 0;
  wake(b.waiting);
}

[[gnu::noinline]] inline Mbarrier& mbarrier_at(const void* at, const Site& site, const void* code) {
  if (observe) observe(at, 8, Touch::read, code);
  const Unobserved own;
  for (Mbarrier& b : block.mbarriers) if (b.at == at) return b;
  fault(site, "an mbarrier that was not initialised");
}

[[gnu::noinline]] inline void mbarrier_init(uint64_t* at, unsigned count, Where where = Where::current()) {
  const Site site{__func__, 0, where};
  if (!in_shared(at, 8) || reinterpret_cast<uintptr_t>(at) % 8) fault(site, "not 8 aligned bytes of shared memory");
  if (count < 1 || count >= 1u << 20) fault(site, std::to_string(count) + " arrivals, outside 1..2^20 - 1");
  if (observe) observe(at, 8, Touch::write, __builtin_return_address(0));
  const Unobserved own;
  std::erase_if(block.mbarriers, [=](const Mbarrier& b) { return b.at == at; });
  block.mbarriers.push_back({at, count, count, 0, {}, {}, {}});
}

[[gnu::noinline]] inline void mbarrier_arrive(uint64_t* at, Where where = Where::current()) {
  Mbarrier& b = mbarrier_at(at, {__func__, 0, where}, __builtin_return_address(0));
  const Unobserved own;
  tell(b.told, self->rank);
  if (--b.pending) return;
  b.pending = b.count, ++b.phase, b.known = b.told;
  wake(b.waiting);
}

// Returns when the phase of that parity, 0 for the first, has completed.
[[gnu::noinline]] inline void mbarrier_wait(uint64_t* at, unsigned parity, Where where = Where::current()) {
  const Site site{__func__, 0, where};
  if (parity > 1) fault(site, "a parity that is neither 0 nor 1");
  for (;;) {
    Mbarrier& b = mbarrier_at(at, site, __builtin_return_address(0));
    if (b.phase % 2 != parity) return b.phase ? learn(self->rank, b.known) : void();
    park(b.waiting, site);
  }
}

}  // namespace simt
