// After every kernel launch: turn a CUDA error into an exception that says what to do.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastlora {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string("fastlora: ") + kernel + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message +=
        " (the library was not compiled for this GPU: see `fastlora doctor`, and rebuild with "
        "FASTLORA_CUDA_ARCHS)";
  }
  throw std::runtime_error(message);
}

}  // namespace fastlora
