// Launches of kernels with much shared memory, optionally as programmatic dependents of the kernel
// in front of them (common/sm90/pdl.cuh), and what a plan needs to know of the device.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

namespace fastlora {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // it is told here: the next launch must not find it
  throw std::runtime_error(std::string("fastlora: ") + what + ": " + cudaGetErrorString(error));
}

// SMs of a device, asked once.
inline int multiprocessors_of(int device) {
  static std::array<std::atomic<int>, 64> known{};
  std::atomic<int>& entry = known[device % known.size()];
  if (entry.load() == 0) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    entry.store(count);
  }
  return entry.load();
}

inline int current_multiprocessors() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return multiprocessors_of(device);
}

constexpr int kMostSharedBytes = 227 * 1024;  // of a CTA on Hopper

struct DependentLaunch {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  bool dependent = false;  // may start before the kernel in front of it has finished
  CUstream_st* stream = nullptr;
};

template <class... Args>
void launch_dependent(void (*kernel)(Args...), const DependentLaunch& launch, const Args&... args) {
  // Beyond 48 KiB a kernel must be allowed its shared memory, on each device; this takes less than
  // looking up whether it was. As much as there is, for other threads may launch it with more.
  if (launch.shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes),
        "shared memory of a kernel");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.dependent ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

}  // namespace fastlora
