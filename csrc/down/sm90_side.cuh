// What rides on the kernel of sm90_kernel.cuh in warps of its own, which wait for nothing and which
// nobody waits for; and the kernel that adds up partial sums.
#pragma once

#include "common/sm90/pdl.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "down/sm90_shape.cuh"

namespace fastlora::sm90 {

// A warp makes 8 unit rows x 32 word columns at a time; all warps of the grid share them evenly.
template <int kCalls>
__device__ __forceinline__ void emit_words(const DownArgs& args, int64_t worker, int64_t workers) {
  const PhiloxState state = load_rng_state(args);
  const int64_t row_groups = (int64_t{args.m} + 31) / 32;
  const int64_t total = (args.words_pitch + 31) / 32 * row_groups;
  const int64_t end = total * (worker + 1) / workers;
#pragma unroll 1
  for (int64_t i = total * worker / workers; i < end; ++i) {
    const auto column = static_cast<uint32_t>(i / row_groups * 32 + threadIdx.x % 32);
    const auto row = static_cast<uint32_t>(i % row_groups * 8);
    const PhiloxWordColumns<kCalls> columns(state, column);
    uint32_t* to = args.words + row * args.words_pitch + column;
    const bool inside = column < args.words_pitch;
#pragma unroll(kCalls >= 3 ? 2 : 4)
    for (uint32_t s = 0; s < 8; ++s, to += args.words_pitch) {
      const uint32_t word = keep_word<kCalls>(state, columns, state.row(row + s), args.keep);
      if (inside) *to = word;
    }
  }
}

template <class T>
__device__ __forceinline__ void cast_matrix(const DownArgs& args, int64_t worker, int64_t workers) {
  const int64_t octets = args.cast_out_pitch / 8;
  for (int64_t i = worker * 32 + threadIdx.x % 32; i < args.cast_rows * octets; i += workers * 32) {
    const int64_t row = i / octets, col = i % octets * 8;
    const float* from = args.cast + row * args.cast_pitch + col;
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = col + j < args.cast_cols ? from[j] : 0.f;
    reinterpret_cast<uint4*>(args.cast_out)[i] = {
        pack<T>(value[0], value[1]), pack<T>(value[2], value[3]), pack<T>(value[4], value[5]),
        pack<T>(value[6], value[7])};
  }
  fence_proxy_async_global();  // gemm reads it by TMA
}

template <class T>
__device__ __forceinline__ void side_jobs(const DownArgs& args) {
  constexpr int kWarps = kDownSideThreads / 32;
  const int64_t ctas = int64_t{gridDim.x} * gridDim.y * gridDim.z;
  const int64_t cta = blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + gridDim.y * blockIdx.z);
  const int64_t worker = cta * kWarps + (threadIdx.x - kDownThreads) / 32;
  if (args.words != nullptr) {
    with_calls(args.calls, [&](auto calls) {
      emit_words<decltype(calls)::value>(args, worker, ctas * kWarps);
    });
  }
  if (args.cast != nullptr) cast_matrix<T>(args, worker, ctas * kWarps);
}

// Two neighbouring columns of a row of out; the padding becomes zero even where x is not finite.
template <class T>
__device__ __forceinline__ void store_pair(const DownArgs& args, int row, int64_t column, float a,
                                           float b) {
  if (column >= args.out_pitch) return;
  if (column >= args.rank) a = 0;
  if (column + 1 >= args.rank) b = 0;
  T* const out = static_cast<T*>(args.out) + row * args.out_pitch + column;
  if (args.out_pairs) {
    *reinterpret_cast<uint32_t*>(out) = pack<T>(a, b);
  } else {
    out[0] = from_float<T>(a);
    if (column + 1 < args.out_pitch) out[1] = from_float<T>(b);
  }
}

__device__ __forceinline__ float load_factor(const DownArgs& args) {
  return args.scaling == nullptr ? args.scale : args.scale * *args.scaling;
}

// out = factor * the sum of `splits` partial sums [m, pitch], in index order. A thread has a pair.
template <class T>
__global__ void __launch_bounds__(256)
    down_sum_kernel(const __grid_constant__ DownArgs args, int splits, int pitch) {
  if (args.wait) pdl_wait();
  const int64_t pairs = (args.out_pitch + 1) / 2;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.m * pairs) return;
  const int row = static_cast<int>(i / pairs);
  const int64_t column = i % pairs * 2;
  float2 sum = {0, 0};
  if (column < pitch) {
    const float* from = args.partial + int64_t{row} * pitch + column;
#pragma unroll 4
    for (int s = 0; s < splits; ++s, from += int64_t{args.m} * pitch) {
      const float2 part = *reinterpret_cast<const float2*>(from);
      sum.x += part.x;
      sum.y += part.y;
    }
  }
  const float factor = load_factor(args);
  store_pair<T>(args, row, column, sum.x * factor, sum.y * factor);
}

}  // namespace fastlora::sm90
