// The 4-bit codes and the rules that choose them, for host and device. Products and sums are
// rounded one by one, as bitsandbytes does: nothing here may be contracted to an fma.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/index.cuh"
#include "nf4/nf4.h"

namespace fastlora {

// Values of the codes 0 .. 15.
struct CodeBook {
  float value[16];
};

constexpr CodeBook kNf4 = {{-1.0f, -0.6961928009986877f, -0.5250730514526367f,
                            -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                            -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                            0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f,
                            0.5626170039176941f, 0.7229568362236023f, 1.0f}};

constexpr CodeBook kFp4 = {{0.0f, 5.208333333e-03f, 0.66666667f, 1.0f, 0.33333333f, 0.5f,
                            0.16666667f, 0.25f, -0.0f, -5.208333333e-03f, -0.66666667f, -1.0f,
                            -0.33333333f, -0.5f, -0.16666667f, -0.25f}};

// Of a value over its block's absmax: code i + 1 if it is greater than bound i. NaN gets code 0.
FASTLORA_HOST_DEVICE int nf4_code(float scaled) {
  constexpr float bounds[15] = {
      -0.8480964004993439f,  -0.6106329262256622f,  -0.4599952697753906f,   -0.33967943489551544f,
      -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
      0.1202552504837513f,   0.2035212516784668f,   0.2920137718319893f,    0.3893125355243683f,
      0.5016634166240692f,   0.6427869200706482f,   0.8614784181118011f};
  int code = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < 15; ++i) code += scaled > bounds[i];
  return code;
}

// The nearest of 256 sorted codes; of two as near the one that the search meets; 0 for NaN.
FASTLORA_HOST_DEVICE int nearest_code(const float* code, float x) {
  int pivot = 127, below = 0, above = 255;
  for (int step = 64; step > 0; step /= 2) {
    if (x > code[pivot]) {
      below = pivot;
      pivot += step;
    } else {
      above = pivot;
      pivot -= step;
    }
  }
  if (x > code[pivot]) return x > (code[above] + code[pivot]) * 0.5f ? above : pivot;
  return x < (code[below] + code[pivot]) * 0.5f ? below : pivot;
}

}  // namespace fastlora
