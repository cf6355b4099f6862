// Results whose type is known at run time only: 0 is fp32, 1 bf16, 2 fp16, as in GradType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastlora::sm90 {

__device__ __forceinline__ void store_as(void* out, int64_t index, float value, int type) {
  if (type == 0) {
    static_cast<float*>(out)[index] = value;
  } else if (type == 1) {
    static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(out)[index] = __float2half_rn(value);
  }
}

}  // namespace fastlora::sm90
