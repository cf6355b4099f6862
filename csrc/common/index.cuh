// Integer helpers shared by host and device code. Sizes are int64_t: nothing here may overflow at
// 2^31.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTLORA_HOST_DEVICE inline
#endif

namespace fastlora {

FASTLORA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastlora
