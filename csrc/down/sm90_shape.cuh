// What the parts of the kernel of sm90_kernel.cuh share: its tile and its arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/philox_parts.cuh"

namespace fastlora::sm90 {

constexpr int kDownM = 64, kDownK = 128;  // rows, and k of a step
constexpr int kDownThreads = 128;         // a warpgroup
constexpr int kDownSideThreads = 128;     // more, where there is a side job
constexpr int kDownXSlab = kDownM * 128, kDownXBytes = 2 * kDownXSlab;
constexpr int kDownWordBytes = kDownM * kDownK / 32 * 4;  // mask words of a step

FASTLORA_HOST_DEVICE constexpr int down_stage_bytes(int rank_block) {
  return kDownXBytes + rank_block * kDownK * 2;
}

enum class LSource { kCopy, kFloatVector, kFloat, kShort };  // how l is read: see sm90_load.cuh

struct DownArgs {
  const void* x;
  int64_t x_pitch;  // bytes
  const void* l;
  int64_t l_stride_rank, l_stride_k;
  LSource l_source;
  void* out;
  int64_t out_pitch;
  bool out_pairs;  // two columns can be stored at once
  float scale;
  const float* scaling;
  float* partial;  // [splits, m, rank blocks * rank block], or null: no splits
  int m, k, rank;
  int steps, stages;

  const int64_t* rng_state;
  int64_t rng_stride;
  uint32_t keep;
  int calls;  // of a mask word: 4 - first_call(keep)
  uint32_t* words;
  int64_t words_pitch;

  const float* cast;
  int64_t cast_rows, cast_cols, cast_pitch;
  void* cast_out;
  int64_t cast_out_pitch;

  bool wait;
};

__device__ __forceinline__ PhiloxState load_rng_state(const DownArgs& args) {
  return {static_cast<uint64_t>(args.rng_state[0]),
          static_cast<uint64_t>(args.rng_state[args.rng_stride])};
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

}  // namespace fastlora::sm90
