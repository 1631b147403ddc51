#include "cuda/device.cuh"
#include "ssd/kernel.h"

namespace pyseq {

int64_t ssd_backward_workspace(const Ssd&) { return 0; }
int ssd_backward_cuda(const Ssd&, void*) { return 801; }

}  // namespace pyseq
