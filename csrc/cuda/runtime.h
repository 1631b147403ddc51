// What the rest of the package asks the CUDA runtime, so that nothing else has to include it.
#pragma once
#include <string>

namespace pyseq {

// A cudaError_t as a sentence: what a launch that returned it ran into, and what to do.
std::string launch_error(int error);

// The newest CUDA that the driver supports and the one the kernels were built with, as 1000 major + 10 minor. 0: no driver.
int cuda_driver_version();
int cuda_runtime_version();

}  // namespace pyseq
