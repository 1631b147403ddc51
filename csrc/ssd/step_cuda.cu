#include "cuda/device.cuh"
#include "ssd/kernel.h"

namespace pyseq {

int ssd_step_cuda(const SsdStep&, void*) { return 801; }

}  // namespace pyseq
