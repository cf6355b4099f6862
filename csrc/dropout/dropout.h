// Family "dropout": the mask words of a dropout state, as fastlora/reference.py defines them. The
// other kernels take the words; they are made once in forward and again in backward, never saved.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

struct DropoutMask {
  const int64_t* rng_state;  // (seed, offset), in the memory of the device that computes
  int64_t rng_stride;        // in elements
  uint32_t* words;           // [rows, pitch], contiguous
  int64_t rows;              // 0 .. 2^32
  int64_t pitch;             // words a row: ceil(cols / 32), 0 .. 2^30
  uint32_t keep;             // 0 .. 32768: keeps keep / 32768 of the elements
};

// Words [begin, end) of the rows * pitch words, counted row by row.
void dropout_mask_cpu(const DropoutMask& params, int64_t begin, int64_t end);

// The whole mask, asynchronously on `stream` of the current device.
void dropout_mask_cuda(const DropoutMask& params, CUstream_st* stream);

}  // namespace fastlora
