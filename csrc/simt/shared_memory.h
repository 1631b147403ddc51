// Shared memory, filled with NaN bits before every block: what a block reads it must have written.
//
// Static: `__shared__` means `thread_local`, which all fibers of a block share since they are on one OS thread, and the
// module's thread-local segment is found through the dynamic loader. Whatever else lives in that segment is put aside
// while a kernel runs (no other code of the module runs then). Dynamic: one buffer, of which the address sanitizer
// allows only the bytes that the launch asked for.
#pragma once
#include <link.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
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

inline Segment static_shared() {
  Segment found{&in_segment, 0};
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& segment = *static_cast<Segment*>(data);
    auto* tls = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; tls && i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type == PT_TLS && segment.begin >= tls && segment.begin < tls + header.p_memsz) {
        segment = {tls, header.p_memsz};
        return 1;
      }
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  if (found.size == 0) {
    std::fputs("simt: the dynamic loader does not tell where thread-local memory is\n", stderr);
    std::abort();
  }
  return found;
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
