#include "cuda/device.cuh"
#include "ssd/kernel.h"

namespace pyseq {

int64_t ssd_forward_workspace(const Ssd&) { return 0; }
int ssd_forward_cuda(const Ssd&, void*) { return 801; }

}  // namespace pyseq
