// What the memory system would have to do for a kernel: 32-byte sectors per request to global memory, wavefronts per
// request to shared memory. Off unless count_traffic() turns it on.
//
// A request is one execution of one access by the lanes of a warp. Lanes run apart here, so the n-th time a lane comes
// to an access is put together with the n-th time of the others, counted from the last place where the whole warp met;
// in loops that lanes leave at different times without meeting this may mix up requests. Shared memory has 32 banks of
// 4 bytes; 8- and 16-byte accesses go by half and quarter warps, and neighbouring parts that need no bank twice go
// together. The accesses are those that g++ compiles; nvcc may join or drop some. Not modelled: caches, atomics, local
// memory and spills, constant memory, kernel arguments.
#pragma once
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "simt/launch.h"

namespace simt {

struct Request { bool shared; uint8_t size; uint32_t lanes; uintptr_t at[kWarp]; };
struct Pending { uint32_t times[kWarp]; std::vector<Request> requests; };   // at one place in the code

struct Range {
  uintptr_t begin, end;
  bool contains(uintptr_t p) const { return p >= begin && p < end; }
};

struct Counter {
  std::unordered_map<const char*, Pending> pending[kMaxWarps];
  std::map<const char*, Traffic>* lines;                         // of the running kernel
  std::vector<Range> own;                                        // neither shared nor global: stacks, this module
};
inline Counter counter;

inline void add_global(const Request& r, Traffic& to) {
  std::array<uintptr_t, kWarp> at;
  int n = 0;
  for (uint32_t rest = r.lanes; rest; rest &= rest - 1) at[n++] = r.at[std::countr_zero(rest)];
  std::sort(at.begin(), at.begin() + n);
  uintptr_t end = 0, next_sector = 0;                            // of the bytes, and of the sectors, counted so far
  int64_t bytes = 0;
  for (int i = 0; i < n; ++i) {
    const uintptr_t last = at[i] + r.size;
    bytes += int64_t(last > end ? last - std::max(end, at[i]) : 0), end = std::max(end, last);
    const uintptr_t first = std::max(next_sector, at[i] / 32), beyond = (last + 31) / 32;
    if (beyond > first) to.sectors += int64_t(beyond - first), next_sector = beyond;
  }
  ++to.requests, to.ideal_sectors += (bytes + 31) / 32;
}

// The words of each bank that some lanes use; `most` is the largest number of words in one bank.
struct Banks {
  std::vector<uintptr_t> words[32];
  size_t most = 0, total = 0;
  void add(uintptr_t word) {
    auto& bank = words[word % 32];
    if (std::find(bank.begin(), bank.end(), word) != bank.end()) return;
    bank.push_back(word), ++total, most = std::max(most, bank.size());
  }
};

inline void add_shared(const Request& r, Traffic& to) {
  const unsigned parts = r.size <= 4 ? 1 : r.size / 4, lanes = kWarp / parts;
  Banks all, joined;
  for (unsigned part = 0; part < parts; ++part) {
    Banks with = joined, own;
    for (unsigned i = part * lanes; i < (part + 1) * lanes; ++i) {
      if (!(r.lanes >> i & 1)) continue;
      for (uintptr_t word = r.at[i] / 4; word <= (r.at[i] + r.size - 1) / 4; ++word) {
        all.add(word), with.add(word), own.add(word);
      }
    }
    if (with.most <= 1) {
      joined = with;
    } else {
      to.wavefronts += int64_t(joined.most), joined = own;
    }
  }
  to.wavefronts += int64_t(joined.most);
  ++to.shared_requests, to.ideal_wavefronts += int64_t(all.total + 31) / 32;
}

inline void count_warp(unsigned w) {
  if (!record.counts) return;
  for (auto& [code, pending] : counter.pending[w]) {
    if (pending.requests.empty()) continue;
    Traffic& line = (*counter.lines)[code];
    for (const Request& r : pending.requests) r.shared ? add_shared(r, line) : add_global(r, line);
    pending = {};
  }
}

inline void count(bool shared, uintptr_t at, size_t size, const char* code) {
  for (const Range& range : counter.own) if (!shared && range.contains(at)) return;
  Pending& p = counter.pending[self->rank / kWarp][code];
  const uint32_t n = p.times[lane()]++;
  if (n == p.requests.size()) p.requests.push_back({shared, uint8_t(size), 0, {}});
  p.requests[n].lanes |= 1u << lane();
  p.requests[n].at[lane()] = at;
}

inline void count_kernel(const std::string& name) {
  counter.lines = &record.traffic[name];
  for (auto& warp : counter.pending) warp.clear();
  pthread_attr_t attributes;
  void* stack;
  size_t size;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &size);
  pthread_attr_destroy(&attributes);
  const auto begin = reinterpret_cast<uintptr_t>(stack);
  counter.own = {{begin, begin + size}, {stacks.begin(), stacks.end()}};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
    Range all{~uintptr_t(0), 0};
    for (const auto* h = info->dlpi_phdr; h < info->dlpi_phdr + info->dlpi_phnum; ++h) {
      if (h->p_type != PT_LOAD) continue;
      const uintptr_t from = info->dlpi_addr + h->p_vaddr;
      all = {std::min(all.begin, from), std::max(all.end, from + h->p_memsz)};
    }
    if (!all.contains(reinterpret_cast<uintptr_t>(&counter))) return 0;
    counter.own.push_back(all);
    return 1;
  }, nullptr);
}

}  // namespace simt
