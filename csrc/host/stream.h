// The CUDA stream to launch on. The stable ABI's getter for it lives in CUDA builds of torch only,
// so it is declared weak: the op library then also loads under CPU-only torch, where it stays null.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "host/check.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA toolkit

namespace fastlora {

// torch's current stream of that device, never the default stream: launches stay capturable in CUDA
// graphs and ordered with the work around them.
inline CUstream_st* current_stream(int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "fastlora: a CUDA op was called, but this torch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device_index, &stream) == AOTI_TORCH_SUCCESS,
        "fastlora: torch has no current stream for CUDA device ", device_index);
  return static_cast<CUstream_st*>(stream);
}

}  // namespace fastlora
