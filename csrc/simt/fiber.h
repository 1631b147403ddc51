// Fibers: many call stacks on one OS thread, switched by hand.
//
// switch_to(from, to) saves the callee-saved registers on the current stack, stores the stack pointer in `from` and
// continues where `to` was left. Fibers that will never be continued are simply forgotten: their stacks are reused,
// and no destructor runs, so what runs on a fiber must not own anything.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

struct Context {
#ifdef SIMT_USE_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;                                   // lowest address; for the address sanitizer
  size_t stack_size = 0;
};

#ifdef SIMT_USE_UCONTEXT

inline void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare(Context& context, char* top, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = const_cast<void*>(context.stack);
  context.state.uc_stack.ss_size = top - static_cast<const char*>(context.stack);
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#else

#if __has_attribute(noipa)
#define SIMT_OPAQUE naked, noinline, noipa
#else
#define SIMT_OPAQUE naked, noinline
#endif
// The compiler must not look inside: whatever other fibers may change in memory has to be read again after the call.
__attribute__((SIMT_OPAQUE)) inline void swap_stacks([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

inline void swap(Context& from, Context& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

// The stack of a fiber that never ran looks as if it had called swap_stacks from `entry`.
inline void prepare(Context& context, char* top, void (*entry)()) {
  auto** word = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--word = nullptr;                                             // where `entry` would return to: ends a backtrace
  *--word = reinterpret_cast<void*>(entry);
  constexpr int kSavedRegisters = 6;
  word -= kSavedRegisters;
  std::memset(word, 0, kSavedRegisters * sizeof(void*));
  context.stack_pointer = word;
}

#endif

inline void switch_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_size);
  swap(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swap(from, to);
#endif
}

// First thing on a new fiber: learns the stack of whoever started it.
inline void fiber_entered([[maybe_unused]] Context& starter) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &starter.stack, &starter.stack_size);
#endif
}

// One stack per thread of a block, mapped once; a page without access below each turns an overflow into a fault.
// An odd number of pages per stack, and tops that differ by cache lines, keep stacks out of each other's cache sets.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStride) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
    for (size_t i = 0; i < count; ++i) mprotect(base_ + i * kStride, kPage, PROT_NONE);
  }
  ~Stacks() { munmap(base_, bytes_); }
  Stacks(const Stacks&) = delete;

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(base_); }
  uintptr_t end() const { return begin() + bytes_; }

  void start(Context& context, size_t i, void (*entry)()) {
    char* const bottom = base_ + i * kStride + kPage;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom, kSize);                // frames of a forgotten fiber
#endif
    context.stack = bottom;
    context.stack_size = kSize;
    prepare(context, bottom + kSize - i % 64 * 64, entry);
  }

 private:
  static constexpr size_t kPage = 4096, kSize = 64 * kPage, kStride = kSize + kPage;
  size_t bytes_;
  char* base_;
};

}  // namespace simt
