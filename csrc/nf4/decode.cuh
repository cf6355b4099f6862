// From codes and scales to operands of the tensor cores, for the linears over 4-bit weights.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "nf4/code.cuh"

namespace fastlora {

constexpr int kNf4BlockK = 64;  // elements of a row multiplied at a time

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <class T>
__device__ __forceinline__ float wide(T value) {
  return static_cast<float>(value);
}

// ---- Code values in 16 bits --------------------------------------------------------------------
//
// Two or three of NF4's are rounded the other way. All to the nearest, their errors, of normal
// weights, have a mean of 1.8e-4 in bf16; where x has a mean as well that error grows with k while
// others go with its root: torch's error eightfold at k = 14336. So chosen it is 3e-6.
constexpr CodeBook with_value(CodeBook book, int i, float value) {
  book.value[i] = value;
  return book;
}
constexpr CodeBook kNf4Bfloat16 =
    with_value(with_value(kNf4, 3, -0.396484375f), 6, -0.09130859375f);
constexpr CodeBook kNf4Half =
    with_value(with_value(with_value(kNf4, 5, -0.1846923828125f), 6, -0.09100341796875f), 8,
               0.07952880859375f);

template <class T>
CodeBook code_book(bool fp4) {
  if (fp4) return kFp4;
  return std::is_same_v<T, __half> ? kNf4Half : kNf4Bfloat16;
}

// ---- The table: a byte is two elements --------------------------------------------------------
//
// Entry `byte`, at byte << kShift, is the pair of elements in T, 32 times: every lane finds it in a
// bank of its own. Entries are 128 bytes (kShift 7) or, where there is room, 256 of which half is
// empty (8): one instruction less to find one.

template <class T, int kShift>
__device__ __forceinline__ void fill_table(char* table, const float* value, int thread,
                                           int threads) {
  // A thread writes an entry, or where there are 512 of them half of one.
  const int parts = threads >= 512 ? 2 : 1;
  for (int byte = thread / parts; byte < 256; byte += threads / parts) {
    const uint32_t pair = pack2<T>(value[byte / 16], value[byte % 16]);
    for (int i = thread % parts; i < 8; i += parts) {
      const int chunk = (i + byte) % 8;  // lanes write to different banks
      *reinterpret_cast<uint4*>(table + (byte << kShift) + chunk * 16) =
          make_uint4(pair, pair, pair, pair);
    }
  }
}

// The entry of byte `which` of a word, for the lane that was given as `lane` * 4.
template <int kShift>
__device__ __forceinline__ uint32_t table_entry(const char* table, uint32_t word, int which,
                                                uint32_t lane_bytes) {
  uint32_t at;
  if constexpr (kShift == 8) {  // bytes: the lane's, the code's, and two that are zero
    at = __byte_perm(word, lane_bytes, 0x6504 | which << 4);
  } else {
    at = (__funnelshift_r(word, word, (8 * which + 32 - kShift) % 32) & (0xFF << kShift)) |
         lane_bytes;
  }
  return *reinterpret_cast<const uint32_t*>(table + at);
}

// ---- Scales -----------------------------------------------------------------------------------

// A block's scale as it is loaded, ahead of its use, where it is made.
struct Scale {
  float absmax;  // or nested_absmax, of
  uint32_t code;
};
__device__ __forceinline__ Scale load_scale(const Nf4Scales& scales, int block) {
  if (scales.absmax != nullptr) return {__ldg(scales.absmax + block), 0};
  return {__ldg(scales.nested_absmax + (block >> scales.nested_shift)),
          __ldg(scales.codes + block)};
}
// In two roundings, as in bitsandbytes. `code`: the values of quantised scales.
__device__ __forceinline__ float make_scale(const Scale& scale, bool nested, const float* code,
                                            float offset) {
  return nested ? __fadd_rn(__fmul_rn(code[scale.code], scale.absmax), offset) : scale.absmax;
}

}  // namespace fastlora
