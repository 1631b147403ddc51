#include "cuda/runtime.h"

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
    text += "; this build has no kernels for that architecture: build pyseq from source where the card is";
  }
  return text + "; `pyseq doctor` tells what was built";
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int cuda_runtime_version() { return CUDART_VERSION; }

#else

std::string launch_error(int) { return "the emulator refused it: " + simt::record.last_error; }
int cuda_driver_version() { return 0; }
int cuda_runtime_version() { return CUDART_VERSION; }

#endif

}  // namespace pyseq
