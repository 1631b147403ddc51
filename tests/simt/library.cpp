// The test kernels and the emulator's controls as a C library.
#include "access.cu"
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
void count_traffic(int on) { simt::record.counts = on, simt::record.traffic.clear(); }
// Of all kernels since then: requests, sectors, ideal sectors; shared requests, wavefronts, ideal wavefronts.
void traffic(int64_t* sums) {
  for (const auto& [kernel, places] : simt::record.traffic) {
    for (const auto& [code, t] : places) {
      const int64_t each[] = {t.requests,        t.sectors,    t.ideal_sectors,
                              t.shared_requests, t.wavefronts, t.ideal_wavefronts};
      for (int i = 0; i < 6; ++i) sums[i] += each[i];
    }
  }
}
const char* last_error() { return simt::record.last_error.c_str(); }
int64_t launches(const char* kernel) {
  const auto found = simt::record.launches.find(kernel);
  return found == simt::record.launches.end() ? 0 : found->second;
}
}
#pragma GCC visibility pop
