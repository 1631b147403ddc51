// Launching a kernel: CUDA's limits, the blocks of a grid one after another, and a record of what ran.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "simt/block.h"
#include "simt/shared_memory.h"

namespace simt {

struct Traffic {                                                 // see traffic.h
  int64_t requests, sectors, ideal_sectors, shared_requests, wavefronts, ideal_wavefronts;
};

struct Record {
  std::mutex one_at_a_time;                                      // launches of all OS threads share `block`
  Order block_order;
  std::map<const void*, std::string> names;                      // of kernels, given by pyseq::launch
  std::map<std::string, int64_t> launches;                       // accepted launches by name
  std::string last_error;
  bool counts = false;                                           // traffic
  std::map<std::string, std::map<const char*, Traffic>> traffic; // by name, by place in the code
};
inline Record record;
inline void (*kernel_begins)(const std::string& name) = nullptr;

inline std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

// What CUDA refuses, in CUDA's codes; the reason is in `why`.
inline cudaError_t refuse(const cudaLaunchConfig_t& config, std::string& why) {
  const dim3 g = config.gridDim, b = config.blockDim;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    why = "grid " + text(g) + " is outside 1..(2147483647, 65535, 65535)";
    return cudaErrorInvalidConfiguration;
  }
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t(b.x) * b.y * b.z > kMaxThreads) {
    why = "block " + text(b) + " is outside 1..(1024, 1024, 64) or has more than 1024 threads";
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > kMaxSharedMemory) {
    why = std::to_string(config.dynamicSmemBytes) + " bytes of dynamic shared memory, more than " +
          std::to_string(kMaxSharedMemory);
    return cudaErrorInvalidValue;
  }
  if (static_shared().size == 0) {
    why = "the emulator does not know where this module's thread-local memory is";
    return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

inline bool run_grid(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim;
  SharedMemory shared(config.dynamicSmemBytes);
  position = {{}, {}, config.blockDim, grid};
  block.error.clear();
  block.schedule.restart(), record.block_order.restart();
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  record.block_order.arrange(blocks.data(), uint32_t(blocks.size()));
  for (const uint64_t i : blocks) {
    position.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))};
    shared.poison();
    if (!run_block()) return false;
  }
  return true;
}

// `call(bound)` runs one thread of the kernel with its arguments.
inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(const void*),
                          const void* bound) {
  const std::lock_guard lock(record.one_at_a_time);
  const auto known = record.names.find(kernel);
  const std::string name = known == record.names.end() ? "unnamed kernel" : known->second;
  std::string why;
  if (const cudaError_t error = refuse(config, why)) {
    record.last_error = name + ": " + why;
    return error;
  }
  ++record.launches[name];
  block.bound = bound, block.call = call;
  if (kernel_begins && record.counts) kernel_begins(name);
  if (run_grid(config)) return cudaSuccess;
  const uint3 at = position.block;
  record.last_error = name + ", block " + text({at.x, at.y, at.z}) + ": " + block.error;
  return cudaErrorLaunchFailure;
}

// "... kernel = ns::(anonymous)::scan_kernel<float>; ..." -> "scan_kernel<float>"; clang has a comma and no <float>
inline std::string kernel_name(std::string signature) {
  const size_t begin = signature.find("kernel = ") + 9;
  const size_t end = std::min(signature.find_first_of(";]", begin), signature.find(", Arguments", begin));
  std::string name = signature.substr(begin, end - begin);
  std::erase_if(name, [](char c) { return c == '(' || c == ')' || c == '&' || c == ' '; });
  const size_t arguments = std::min(name.find('<'), name.size()), scope = name.rfind("::", arguments);
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

// For launches() and messages; `signature` is the __PRETTY_FUNCTION__ of a template whose parameter is `kernel`.
inline void name_kernel(const void* kernel, const char* signature) {
  const std::lock_guard lock(record.one_at_a_time);
  if (!record.names.contains(kernel)) record.names[kernel] = kernel_name(signature);
}

}  // namespace simt

// The runtime's own spelling, so that one launcher serves both compilers.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto bound = [&] { kernel(static_cast<Parameters>(arguments)...); };
  const auto call = [](const void* b) { (*static_cast<decltype(bound)*>(b))(); };
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), call, &bound);
}
