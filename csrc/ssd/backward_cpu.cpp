#include "ssd/kernel.h"

namespace pyseq::PYSEQ_ISA {

int64_t ssd_backward_units(const Ssd&) { return 0; }
int64_t ssd_backward_scratch(const Ssd&) { return 0; }
int64_t ssd_backward_workspace(const Ssd&) { return 0; }
void ssd_backward(const Ssd&, int64_t, int64_t) {}
void ssd_reduce_tokens(const Ssd&, int64_t, int64_t) {}
void ssd_reduce_heads(const Ssd&, int64_t, int64_t) {}

}  // namespace pyseq::PYSEQ_ISA
