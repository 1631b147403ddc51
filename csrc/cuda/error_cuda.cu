#include "cuda/error.h"

#include "cuda/device.cuh"

namespace pyseq {

#ifdef __CUDACC__

std::string launch_error(int code) {
  const auto error = static_cast<cudaError_t>(code);
  std::string text = std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
  int device = 0;
  cudaDeviceProp card{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&card, device) != cudaSuccess) return text;
  text += " (" + std::string(card.name) + ", sm_" + std::to_string(10 * card.major + card.minor) + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    text += "; this build of pyseq has no kernels for that architecture: build it there from source, see `pyseq doctor`";
  }
  return text;
}

#else

std::string launch_error(int) { return "the emulator refused it: " + simt::record.last_error; }

#endif

}  // namespace pyseq
