// A linear of few rows over a 4-bit weight, with its low-rank update, in a pair of launches.
#pragma once

#include <cstdint>

#include "nf4/nf4.h"

namespace fastlora {

// y [m, n] = x [m, k] W^T + bias + h b^T, h [m, rank] = scale [scaling] x a^T. W [n, k] in 4 bits,
// whole blocks of 64 elements or more in a row; k is a multiple of 64, m up to 64 and rank up
// to 16. Rows of x, codes and a start at multiples of 16 bytes.
struct Nf4Few {
  int64_t m, n, k, rank;  // rank may be 0: no update
  bool half;              // float16, or bfloat16
  const void* x;
  int64_t x_pitch;
  const uint8_t* codes;
  Nf4Scales scales;
  int block_shift;
  bool fp4;
  const void *a, *b;  // [rank, k] and [n, rank], contiguous, x's type or float32
  bool a_float, b_float;
  const void* bias;  // [n] or null
  float scale;
  const float* scaling;  // or null
  void *y, *h;
};

constexpr int kMostFewRows = 64;
constexpr int kMostFewRanks = 16;

void nf4_few_cuda(const Nf4Few& params, CUstream_st* stream);

}  // namespace fastlora
