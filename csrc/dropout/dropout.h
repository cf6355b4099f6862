// Family "dropout": the mask words of a dropout state, as fastlora/reference.py defines them. The
// other kernels take the words; they are made once in forward and again in backward, never saved.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

struct DropoutMask {
  const int64_t* rng_state;  // (seed, offset), in the memory of the device that computes
  int64_t rng_stride;        // in elements
  uint32_t* words;           // [unit_rows, unit_cols], contiguous
  int64_t unit_rows;         // 8 ceil(rows / 32)
  int64_t unit_cols;         // ceil(cols / 8)
  uint32_t keep;             // 0 .. 65536: keeps keep / 65536 of the elements
};

// Words [begin, end), counted row by row.
void dropout_mask_cpu(const DropoutMask& params, int64_t begin, int64_t end);

// The whole mask, asynchronously on `stream` of the current device.
void dropout_mask_cuda(const DropoutMask& params, CUstream_st* stream);

}  // namespace fastlora
