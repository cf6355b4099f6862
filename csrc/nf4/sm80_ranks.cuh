// h = s x A^T, or g: the ranks of rows of x, in front of a linear over a 4-bit weight.
//
//   CTA      8 to 32 rows of x and all ranks; on Hopper a cluster splits k
//   product  mma.sync m16n8k16: 16 ranks by 8 rows of x. The tensor cores do not mind the order of
//            K: of the 64 elements of a block a lane takes 16 that are neighbours
#pragma once

#include "common/sm80/mma.cuh"
#include "common/sm90/cluster.cuh"
#include "common/sm90/pdl.cuh"
#include "nf4/decode.cuh"
#include "nf4/linear.h"

namespace fastlora {

// 16 neighbours of a row, as 8 pairs.
template <class T, class From>
__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[8], const From* from) {
  if constexpr (std::is_same_v<From, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from) + i);
      pairs[2 * i] = pack2<T>(four.x, four.y);
      pairs[2 * i + 1] = pack2<T>(four.z, four.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from) + i);
      pairs[4 * i] = eight.x, pairs[4 * i + 1] = eight.y;
      pairs[4 * i + 2] = eight.z, pairs[4 * i + 3] = eight.w;
    }
  }
}

// h = scale x A^T: of kTiles x 8 rows of x, all ranks. Parts of k meet in shared memory: warps, and
// where there are clusters the CTAs of one. Both are added in order.
constexpr int kRankWarps = 8;

template <class T, class A, int kTiles>
__global__ void __launch_bounds__(kRankWarps * 32) ranks_kernel(Nf4Linear p, int splits) {
#if __CUDA_ARCH__ >= 900
  sm90::pdl_launch_dependents();
#endif
  constexpr int kRows = kTiles * 8, kEach = kMostNf4Ranks * kRows;
  __shared__ float sums[kRankWarps][kMostNf4Ranks][kRows + 1];
  __shared__ float share[kEach];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int part = static_cast<int>(blockIdx.x) % splits;
  const int64_t first = int64_t{blockIdx.x / splits} * kRows;
  const T* x[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    x[t] = static_cast<const T*>(p.x) + min(first + t * 8 + g, p.m - 1) * p.x_pitch + q * 16;
  }
  const A* a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = static_cast<const A*>(p.a) + min(int64_t{i * 8 + g}, p.rank - 1) * p.k + q * 16;
  }
  float acc[kTiles][4] = {};
  const int64_t blocks = p.k / kNf4BlockK;
#pragma unroll 2
  for (int64_t j = part * kRankWarps + warp; j < blocks; j += splits * kRankWarps) {
    uint32_t of_x[kTiles][8], of_a[2][8];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_pairs<T>(of_x[t], x[t] + j * kNf4BlockK);
    load_pairs<T>(of_a[0], a[0] + j * kNf4BlockK);
    load_pairs<T>(of_a[1], a[1] + j * kNf4BlockK);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t step[4] = {of_a[0][2 * s], of_a[1][2 * s], of_a[0][2 * s + 1],
                                of_a[1][2 * s + 1]};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply<T>(acc[t], step, of_x[t][2 * s], of_x[t][2 * s + 1]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][g + e / 2 * 8][t * 8 + q * 2 + e % 2] = acc[t][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kEach; i += kRankWarps * 32) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kRankWarps; ++w) all += sums[w][i % kMostNf4Ranks][i / kMostNf4Ranks];
    share[i] = all;
  }
#if __CUDA_ARCH__ >= 900
  sm90::cluster_sync();
#else
  __syncthreads();
#endif
  const float scale = p.scaling == nullptr ? p.scale : p.scale * *p.scaling;
  for (int i = part * kRankWarps * 32 + static_cast<int>(threadIdx.x); i < kEach;
       i += splits * kRankWarps * 32) {
    const int64_t row = first + i / kMostNf4Ranks;
    const int r = i % kMostNf4Ranks;
    if (row >= p.m || r >= p.rank)
      continue;  // what is read is used: the barrier below relies on it
    float all = 0;
    for (int s = 0; s < splits; ++s) {
#if __CUDA_ARCH__ >= 900
      float one;
      asm volatile(
          "ld.shared::cluster.f32 %0, [%1];"
          : "=f"(one)
          : "r"(sm90::address_in(static_cast<uint32_t>(__cvta_generic_to_shared(share + i)), s))
          : "memory");
      all += one;
#else
      all += share[i];
#endif
    }
    static_cast<T*>(p.h)[row * p.rank + r] = static_cast<T>(scale * all);
  }
#if __CUDA_ARCH__ >= 900
  sm90::cluster_sync_readers();
#endif
}

}  // namespace fastlora
