// Races in shared memory: two threads use a byte, one of them writes, and nothing orders the two.
//
// For every byte of shared memory: who wrote it and who read it last, and when. Ordered are accesses of one thread,
// accesses with a __syncthreads between, those of two lanes that a __syncwarp lies between (shuffles and votes order
// nothing), and those that a named barrier or an mbarrier orders. What cp.async writes is out of bounds for everybody
// until the wait of its thread; from there on it counts as written by that thread at that moment. Not watched: atomics,
// races in global memory.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "simt/block.h"
#include "simt/shared_memory.h"

namespace simt {

constexpr uint32_t kInFlight = ~0u;                              // the clock of a copy that was not waited for
struct Access { uint64_t epoch; const char* code; uint32_t rank, clock; };
struct Byte { Access write, read[2]; };                          // the last two readers that differ
inline Byte* shadow[2];                                          // of static and dynamic memory; zero is long ago

inline bool ordered(const Access& a) {
  if (a.clock == kInFlight) return a.epoch < block.first_epoch;
  if (a.epoch < block.epoch || a.rank == self->rank) return true;
  if (a.rank / kWarp == self->rank / kWarp && warp().clock[lane()][a.rank % kWarp] >= a.clock) return true;
  return !block.known.empty() && block.known[size_t(self->rank) * block.num_threads + a.rank] >= a.clock;
}

// "scan.cu:17" from each address that a call returns to: of the calls inlined there, the innermost made by a .cu file.
inline std::vector<std::string> source_lines(const std::vector<const char*>& codes) {
  std::vector<std::string> lines(codes.size(), "an unknown line");
  Dl_info module;
  if (codes.empty() || !dladdr(codes[0], &module)) return lines;
  std::string command = std::string("addr2line -a -i -e '") + module.dli_fname + "'";
  for (const char* code : codes) {
    char address[32];
    std::snprintf(address, sizeof address, " %#zx", size_t(code - 1 - static_cast<const char*>(module.dli_fbase)));
    command += address;
  }
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return lines;
  size_t next = 0;                                               // an address comes first, then its lines
  bool chosen = false;
  for (char text[4096]; std::fgets(text, sizeof text, pipe);) {
    const std::string line = text;
    if (line.starts_with("0x")) {
      ++next, chosen = false;
    } else if (next && next <= lines.size() && !chosen && !line.starts_with("??")) {
      const bool first = lines[next - 1] == "an unknown line";
      chosen = line.find(".cu:") != std::string::npos;
      if (!first && !chosen) continue;
      lines[next - 1] = line.substr(line.rfind('/') + 1, line.find_first_of(" \n") - line.rfind('/') - 1);
    }
  }
  pclose(pipe);
  return lines;
}
inline std::string source_line(const char* code) { return source_lines({code})[0]; }

[[noreturn]] inline void race(const char* now, const char* code, const char* before, const Access& other) {
  const bool copies = other.clock == kInFlight;
  block.error = "race in shared memory: thread " + std::to_string(self->rank) + now + source_line(code) +
                " what thread " + std::to_string(other.rank) + (copies ? " copies at " : before) +
                source_line(other.code) + (copies ? ", with no wait between" : ", with no barrier between");
  stop();
}

// An access to bytes of segment s, 0 static, 1 dynamic.
inline void watch(int s, size_t offset, size_t size, Touch kind, const char* code) {
  const size_t most = s == 0 ? shared_segments[0].size : kMaxSharedMemory;
  if (!shadow[s]) shadow[s] = static_cast<Byte*>(std::calloc(most, sizeof(Byte)));
  Access now{block.epoch, code, self->rank, warp().clock[lane()][lane()]};
  if (kind == Touch::begin_copy) now.clock = kInFlight;
  for (Byte* b = shadow[s] + offset; b < shadow[s] + offset + size; ++b) {
    if (kind == Touch::end_copy) {
      b->write = now;
      continue;
    }
    const char* const verb = kind == Touch::read ? " reads at " : kind == Touch::write ? " writes at " : " copies at ";
    if (!ordered(b->write)) race(verb, code, " wrote at ", b->write);
    if (kind != Touch::read) {
      for (const Access& r : b->read) if (!ordered(r)) race(verb, code, " read at ", r);
      b->write = now;
    } else {
      if (b->read[0].rank != now.rank) b->read[1] = b->read[0];
      b->read[0] = now;
    }
  }
}

}  // namespace simt
