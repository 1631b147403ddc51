// Shared memory, filled with NaN bits before every block: what a block reads it must have written.
//
// Static: `__shared__` means `thread_local`, which all fibers of a block share since they are on one OS thread, and the
// module's thread-local segment is found through the dynamic loader. Whatever else lives in that segment is put aside
// while a kernel runs (no other code of the module runs then). Dynamic: one buffer, of which the address sanitizer
// allows only the bytes that the launch asked for.
#pragma once
#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simt/fiber.h"

namespace simt {

constexpr size_t kMaxSharedMemory = 227 * 1024;                  // per block on sm_90; sm_80 and sm_120 grant less
constexpr int kPoison = 0xff;                                    // float, bf16, fp16 and double NaN; integer -1

static thread_local char in_segment;                             // lies in the thread-local segment of this module
alignas(1024) inline char dynamic_shared[kMaxSharedMemory];

struct Segment { char* begin; size_t size; };
inline Segment shared_segments[2];                               // of the running launch: static, dynamic

inline bool in_shared(const void* address, size_t bytes) {
  for (const Segment& s : shared_segments) {
    const size_t offset = static_cast<const char*>(address) - s.begin;
    if (offset < s.size && bytes <= s.size - offset) return true;
  }
  return false;
}

extern "C" void* __tls_get_addr(void*);

// The calling thread's copy of this module's thread-local segment; empty if it cannot be told.
inline Segment static_shared() {
  struct { unsigned long module, offset; } index{0, 0};          // the loader's tls_index
  struct Found { const char* code; unsigned long module; size_t size; } found{nullptr, 0, 0};
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& f = *static_cast<Found*>(data);
    bool here = false;
    for (const auto* h = info->dlpi_phdr; h < info->dlpi_phdr + info->dlpi_phnum; ++h) {
      const uintptr_t begin = info->dlpi_addr + h->p_vaddr, code = reinterpret_cast<uintptr_t>(f.code);
      if (h->p_type == PT_LOAD && code >= begin && code < begin + h->p_memsz) here = true;
      if (h->p_type == PT_TLS) f.module = info->dlpi_tls_modid, f.size = h->p_memsz;
    }
    return int(here);
  };
  found.code = reinterpret_cast<const char*>(+visit);
  if (!dl_iterate_phdr(visit, &found)) return {};
  index.module = found.module;
  auto* begin = static_cast<char*>(__tls_get_addr(&index));
  return &in_segment >= begin && &in_segment < begin + found.size ? Segment{begin, found.size} : Segment{};
}

// The shared memory of one launch; restores the thread-local segment at its end.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes)
      : dynamic_bytes_(dynamic_bytes), saved_(segment_.begin, segment_.begin + segment_.size) {
    shared_segments[0] = segment_;
    shared_segments[1] = {dynamic_shared, dynamic_bytes};
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(dynamic_shared, kMaxSharedMemory);
    __asan_unpoison_memory_region(dynamic_shared, dynamic_bytes);
#endif
  }
  ~SharedMemory() { std::memcpy(segment_.begin, saved_.data(), segment_.size); }
  SharedMemory(const SharedMemory&) = delete;

  void poison() {
    std::memset(segment_.begin, kPoison, segment_.size);
    std::memset(dynamic_shared, kPoison, dynamic_bytes_);
  }

 private:
  Segment segment_ = static_shared();
  size_t dynamic_bytes_;
  std::vector<char> saved_;
};

}  // namespace simt
