// Where the emulator learns of every load and store. The files with kernels are compiled with -fsanitize=thread, so
// that g++ calls a function before each; those functions are defined here instead of in the sanitizer's library, which
// is not linked. Include this header in one file compiled without that flag.
#pragma once
#include "simt/races.h"
#include "simt/traffic.h"

namespace simt {

inline void touched(const void* address, size_t size, Touch kind, const void* caller) {
  if (!self) return;                                             // the emulator's own, or a launcher's
  const auto* code = static_cast<const char*>(caller);
  for (int s = 0; s < 2; ++s) {
    const size_t offset = static_cast<const char*>(address) - shared_segments[s].begin;
    if (offset >= shared_segments[s].size) continue;
    watch(s, offset, size, kind, code);
    if (record.counts && kind != Touch::end_copy) count(true, reinterpret_cast<uintptr_t>(address), size, code);
    return;
  }
  if (record.counts) count(false, reinterpret_cast<uintptr_t>(address), size, code);
}

inline void read(const void* p, size_t n, const void* caller) {
  if (!Unobserved::alive) touched(p, n, Touch::read, caller);
}
inline void write(const void* p, size_t n, const void* caller) {
  if (!Unobserved::alive) touched(p, n, Touch::write, caller);
}

inline void watch_all() { observe = touched, converged = count_warp, kernel_begins = count_kernel; }

}  // namespace simt

extern "C" {
void __tsan_init() { simt::watch_all(); }   // called when an instrumented file is loaded
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read1(void* p) { simt::read(p, 1, __builtin_return_address(0)); }
void __tsan_read2(void* p) { simt::read(p, 2, __builtin_return_address(0)); }
void __tsan_read4(void* p) { simt::read(p, 4, __builtin_return_address(0)); }
void __tsan_read8(void* p) { simt::read(p, 8, __builtin_return_address(0)); }
void __tsan_read16(void* p) { simt::read(p, 16, __builtin_return_address(0)); }
void __tsan_write1(void* p) { simt::write(p, 1, __builtin_return_address(0)); }
void __tsan_write2(void* p) { simt::write(p, 2, __builtin_return_address(0)); }
void __tsan_write4(void* p) { simt::write(p, 4, __builtin_return_address(0)); }
void __tsan_write8(void* p) { simt::write(p, 8, __builtin_return_address(0)); }
void __tsan_write16(void* p) { simt::write(p, 16, __builtin_return_address(0)); }
void __tsan_unaligned_read2(void* p) { simt::read(p, 2, __builtin_return_address(0)); }
void __tsan_unaligned_read4(void* p) { simt::read(p, 4, __builtin_return_address(0)); }
void __tsan_unaligned_read8(void* p) { simt::read(p, 8, __builtin_return_address(0)); }
void __tsan_unaligned_read16(void* p) { simt::read(p, 16, __builtin_return_address(0)); }
void __tsan_unaligned_write2(void* p) { simt::write(p, 2, __builtin_return_address(0)); }
void __tsan_unaligned_write4(void* p) { simt::write(p, 4, __builtin_return_address(0)); }
void __tsan_unaligned_write8(void* p) { simt::write(p, 8, __builtin_return_address(0)); }
void __tsan_unaligned_write16(void* p) { simt::write(p, 16, __builtin_return_address(0)); }
void __tsan_read_range(void* p, size_t n) { simt::read(p, n, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::write(p, n, __builtin_return_address(0)); }
}
