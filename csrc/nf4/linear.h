// A linear over a 4-bit weight, read as it lies, with its low-rank update.
#pragma once

#include <cstdint>

#include "nf4/nf4.h"

namespace fastlora {

// y [m, n] = x [m, k] W^T + bias + h b^T, h [m, rank] = scale [scaling] x a^T. W [n, k] in 4 bits,
// whole blocks of 64 elements or more in a row; k is a multiple of 64. Rows of x, codes and a start
// at multiples of 16 bytes.
struct Nf4Linear {
  int64_t m, n, k, rank;  // rank may be 0: no update
  bool half;              // float16, or bfloat16
  const void* x;
  int64_t x_pitch;
  const uint8_t* codes;
  Nf4Scales scales;
  int block_shift;
  bool fp4;
  const void *a, *b;  // [rank, k] and [n, rank], contiguous, x's type or float32; without a, h is
  bool a_float, b_float;  // given
  const void* bias;       // [n] or null
  float scale;
  const float* scaling;  // or null
  void *y, *h;           // contiguous, of x's type
};

// csrc/nf4/sm80.cu: the ranks it makes h of, and the rows of x it takes.
constexpr int kMostNf4Ranks = 16;
constexpr int kMostNf4Rows = 64;

// `shared_bytes`: of a CTA at most, or 0: as much as the device has. Fewer choose what smaller GPUs
// run.
void nf4_linear_sm80(const Nf4Linear& params, int shared_bytes, CUstream_st* stream);
// h alone, of any rows of x. The kernel behind it may be launched as its dependent.
void nf4_ranks_sm80(const Nf4Linear& params, CUstream_st* stream);

// csrc/nf4/sm90.cu: any m and, where h is given, any rank. Takes scales by four: the blocks of a
// row, those of quantised scales and their start are multiples of it.
struct Nf4Config {
  int rows;    // of x in a tile: 16, 32, 64, 128 or 256; or 0: as suits
  int splits;  // parts of k (of n backward), in one cluster; or 0: as suits
};
void nf4_linear_sm90(const Nf4Linear& params, const Nf4Config& config, CUstream_st* stream);

// The other direction: y [m, k] = x [m, n] W + h a, which is dX of dY and g. a and h are given, or
// neither with rank 0; no b, bias or scale. Any scales.
void nf4_dx_sm90(const Nf4Linear& params, const Nf4Config& config, CUstream_st* stream);

}  // namespace fastlora
