#pragma once
#include <string>

namespace pyseq {

// A cudaError_t as a sentence: what a launch that returned it ran into, and what to do.
std::string launch_error(int error);

}  // namespace pyseq
