// Family "nf4": 4-bit weights as bitsandbytes stores them (QLoRA, arXiv 2305.14314), quantised and
// dequantised. fastlora/reference.py is the specification.
//
// A weight [N, K] is cut, row after row, into blocks of `block_size` elements. An element is a code
// of 4 bits, two in a byte, the first in the high half; a block has a scale, its absmax. Scales may
// be quantised as well, in blocks of their own: absmax = code[q] * nested_absmax + offset.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };

struct Nf4Scales {
  const float* absmax;  // of each block, or null where they are quantised:
  const uint8_t* codes;
  const float* nested_absmax;  // of each 2^nested_shift scales
  const float* nested_code;    // [256]
  const float* offset;         // [1]
  int nested_shift;
};

// Elements begin .. begin + count of a weight, into `out`; begin is even.
struct Nf4Dequantize {
  const uint8_t* codes;  // of the whole weight
  Nf4Scales scales;
  int block_shift;  // of 2^block_shift elements
  bool fp4;         // the codes are FP4's
  int64_t begin, count;
  void* out;
  FloatType type;
};

struct Nf4Quantize {
  const void* weight;
  FloatType type;
  int64_t count;
  int64_t block_size;
  uint8_t* codes;  // [ceil(count / 2)]
  float* absmax;   // [ceil(count / block_size)]
};

// Scales, less their offset, to 8 bits: the nearest of 256 sorted codes in -1 .. 1.
struct ScaleQuantize {
  const float* values;
  const float* code;  // [256]
  int64_t count;
  int64_t block_size;
  uint8_t* codes;  // [count]
  float* absmax;   // [ceil(count / block_size)]
};

// On the CPU, for a range of blocks, so that the caller can spread ranges over threads.
void nf4_dequantize_cpu(const Nf4Dequantize& params, int64_t first_block, int64_t last_block);
void nf4_quantize_cpu(const Nf4Quantize& params, int64_t first_block, int64_t last_block);
void scale_quantize_cpu(const ScaleQuantize& params, int64_t first_block, int64_t last_block);

// Asynchronously on `stream` of the current device.
void nf4_dequantize_cuda(const Nf4Dequantize& params, CUstream_st* stream);
void nf4_quantize_cuda(const Nf4Quantize& params, CUstream_st* stream);
void scale_quantize_cuda(const ScaleQuantize& params, CUstream_st* stream);

}  // namespace fastlora
