// The test kernels and the emulator's controls as a C library.
#include "good.cu"
#include "pipeline.cu"
#include "planted.cu"
#include "tensor.cu"

#pragma GCC visibility push(default)
extern "C" {
void set_order(int schedule, int block_order) {
  simt::block.schedule.kind = schedule;
  simt::record.block_order.kind = block_order;
}
void set_noise(unsigned seed) { simt::noise_seed = seed; }
const char* last_error() { return simt::record.last_error.c_str(); }
int64_t launches(const char* kernel) {
  const auto found = simt::record.launches.find(kernel);
  return found == simt::record.launches.end() ? 0 : found->second;
}
}
#pragma GCC visibility pop
