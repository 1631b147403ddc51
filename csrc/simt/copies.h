// cp.async: a copy from global to shared memory that its thread starts and later waits for.
//
// Modelled: the data arrives at the wait of the thread that issued the copy, and not before: until then the destination
// is poison, and whoever touches it is at fault (races.h). The wait is of no use to other threads; they need a barrier
// after it. Checked: alignment, where the two ends are, that no thread exits with a copy in flight. Not modelled:
// copies that arrive early, changes of the source between issue and wait.
#pragma once
#include "simt/block.h"
#include "simt/shared_memory.h"
#include "simt/warp.h"

namespace simt {

// Copies `used` of `bytes` bytes; zeros follow.
template <int bytes>
[[gnu::noinline, gnu::no_sanitize("thread")]] void cp_async(void* to, const void* from, int used = bytes,
                                                            Where where = Where::current()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const Site site{__func__, 0, where};
  if (reinterpret_cast<uintptr_t>(to) % bytes) fault(site, "a destination that is not aligned to the size of the copy");
  if (reinterpret_cast<uintptr_t>(from) % bytes) fault(site, "a source that is not aligned to the size of the copy");
  if (used < 0 || used > bytes) fault(site, "more bytes to read than to write, or fewer than none");
  if (!in_shared(to, bytes)) fault(site, "a destination outside shared memory");
  if (used && in_shared(from, used)) fault(site, "a source in shared memory");
  const void* const code = __builtin_return_address(0);
  if (observe && used) observe(from, used, Touch::read, code);
  if (observe) observe(to, bytes, Touch::begin_copy, code);
  const Unobserved own;
  Copy copy{to, code, bytes, self->commits, {}};
  std::memcpy(copy.data, from, used);
  std::memset(to, kPoison, bytes);
  self->copies.push_back(copy);
}

inline void cp_async_commit() { ++self->commits; }

[[gnu::no_sanitize("thread")]] inline void finish_copies(unsigned before) {
  const Unobserved own;
  std::erase_if(self->copies, [=](const Copy& copy) {
    if (copy.group >= before) return false;
    if (observe) observe(copy.to, copy.bytes, Touch::end_copy, copy.code);
    std::memcpy(copy.to, copy.data, copy.bytes);
    return true;
  });
}

// Waits for all committed groups but the last n; the other for every copy issued.
template <int n> void cp_async_wait() { finish_copies(self->commits < n ? 0 : self->commits - n); }
inline void cp_async_wait_all() { finish_copies(~0u); }

}  // namespace simt
