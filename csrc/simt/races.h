// Races in shared memory: two threads use a byte, one of them writes, and no barrier lies between.
//
// The files with kernels are compiled with -fsanitize=thread, so that g++ calls a function before every load and store;
// those functions are defined here instead of in the sanitizer's library, which is not linked. Include this header in
// one file compiled without that flag. For every byte of shared memory it keeps who wrote and who read it last, and
// when. Ordered are accesses of one thread, accesses with a __syncthreads between, and those of two lanes that a
// __syncwarp lies between (shuffles and votes order nothing). Atomics are not watched.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simt/block.h"
#include "simt/shared_memory.h"

namespace simt {

struct Access { uint64_t epoch; const char* code; uint32_t rank, clock; };
struct Byte { Access write, read[2]; };                          // the last two readers that differ
inline bool watching = false;                                    // any kernel compiled for it
inline Byte* shadow[2];                                          // of static and dynamic memory; zero is long ago

inline bool ordered(const Access& a) {
  if (a.epoch < block.epoch || a.rank == self->rank) return true;
  return a.rank / kWarp == self->rank / kWarp && warp().clock[lane()][a.rank % kWarp] >= a.clock;
}

// "scan.cu:17" from an address that a call returns to.
inline std::string source_line(const char* code) {
  Dl_info module;
  if (!dladdr(code, &module)) return "unknown code";
  const size_t offset = code - 1 - static_cast<const char*>(module.dli_fbase);
  char line[4096] = "";
  std::snprintf(line, sizeof line, "addr2line -e '%s' %#zx", module.dli_fname, offset);
  if (FILE* pipe = popen(line, "r")) {
    if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  const std::string text = line;
  if (text.starts_with("??")) return "an unknown line (no debug information)";
  return text.substr(text.rfind('/') + 1, text.find_first_of(" \n") - text.rfind('/') - 1);
}

[[noreturn]] inline void race(const char* now, const char* code, const char* before, const Access& other) {
  block.error = "race in shared memory: thread " + std::to_string(self->rank) + now + source_line(code) +
                " what thread " + std::to_string(other.rank) + before + source_line(other.code) +
                ", with no barrier between";
  stop();
}

inline void watch(const void* address, size_t size, bool writes, const void* caller) {
  const auto* code = static_cast<const char*>(caller);
  for (int s = 0; s < 2; ++s) {
    const size_t offset = static_cast<const char*>(address) - shared_segments[s].begin;
    if (offset >= shared_segments[s].size) continue;
    const size_t most = s == 0 ? shared_segments[0].size : kMaxSharedMemory;
    if (!shadow[s]) shadow[s] = static_cast<Byte*>(std::calloc(most, sizeof(Byte)));
    const Access now{block.epoch, code, self->rank, warp().clock[lane()][lane()]};
    for (Byte* b = shadow[s] + offset; b < shadow[s] + offset + size; ++b) {
      const char* const verb = writes ? " writes at " : " reads at ";
      if (!ordered(b->write)) race(verb, code, " wrote at ", b->write);
      if (writes) {
        for (const Access& r : b->read) if (!ordered(r)) race(verb, code, " read at ", r);
        b->write = now;
      } else {
        if (b->read[0].rank != now.rank) b->read[1] = b->read[0];
        b->read[0] = now;
      }
    }
  }
}

}  // namespace simt

extern "C" {
void __tsan_init() { simt::watching = true; }   // called when an instrumented file is loaded
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read1(void* p) { simt::watch(p, 1, false, __builtin_return_address(0)); }
void __tsan_read2(void* p) { simt::watch(p, 2, false, __builtin_return_address(0)); }
void __tsan_read4(void* p) { simt::watch(p, 4, false, __builtin_return_address(0)); }
void __tsan_read8(void* p) { simt::watch(p, 8, false, __builtin_return_address(0)); }
void __tsan_read16(void* p) { simt::watch(p, 16, false, __builtin_return_address(0)); }
void __tsan_write1(void* p) { simt::watch(p, 1, true, __builtin_return_address(0)); }
void __tsan_write2(void* p) { simt::watch(p, 2, true, __builtin_return_address(0)); }
void __tsan_write4(void* p) { simt::watch(p, 4, true, __builtin_return_address(0)); }
void __tsan_write8(void* p) { simt::watch(p, 8, true, __builtin_return_address(0)); }
void __tsan_write16(void* p) { simt::watch(p, 16, true, __builtin_return_address(0)); }
void __tsan_unaligned_read2(void* p) { simt::watch(p, 2, false, __builtin_return_address(0)); }
void __tsan_unaligned_read4(void* p) { simt::watch(p, 4, false, __builtin_return_address(0)); }
void __tsan_unaligned_read8(void* p) { simt::watch(p, 8, false, __builtin_return_address(0)); }
void __tsan_unaligned_read16(void* p) { simt::watch(p, 16, false, __builtin_return_address(0)); }
void __tsan_unaligned_write2(void* p) { simt::watch(p, 2, true, __builtin_return_address(0)); }
void __tsan_unaligned_write4(void* p) { simt::watch(p, 4, true, __builtin_return_address(0)); }
void __tsan_unaligned_write8(void* p) { simt::watch(p, 8, true, __builtin_return_address(0)); }
void __tsan_unaligned_write16(void* p) { simt::watch(p, 16, true, __builtin_return_address(0)); }
void __tsan_read_range(void* p, size_t n) { simt::watch(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::watch(p, n, true, __builtin_return_address(0)); }
}
