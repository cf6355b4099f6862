// y [m, n] = x W^T + bias + h B^T and h = s x A^T for few rows on Hopper: W comes from memory once,
// and nothing else takes longer. Backward dX = dY W + g A and g = s dY B, named as forward: the
// same but for what is contiguous (few.h).
//
// A CTA makes 64 rows x kC columns over its share of K, and with the same instructions x A^T over
// the same K: its share of h, which every tile of columns makes for itself. As B is applied before
// shares are added up, nobody waits for h: y is the sum of shares x_i W_i^T + (s x_i A_i^T) B^T. A
// share of h is not rounded once but split in two 16-bit numbers, which together are more exact
// than the one h that is stored.
//
// Who does what (256 threads, one or two CTAs an SM):
//   warp 0       one thread fills the ring by TMA
//   warps 1 - 3  bring B; round an fp32 A in the ring
//   warps 4 - 7  multiply by wgmma, lay their fp32 shares into shared memory
//   all          each CTA of a cluster adds up the shares of its part of the columns, in order
// Clusters: `splits` CTAs of K times `cluster_m` of rows; the latter share W and A, each loads its
// part for all (the ring's slots are then free when all of them are done).
//
// Shared memory: stages x (x: up to 64 rows, W: kC, A: kN, backward 64, of 128 bytes each; the
// boxes of an fp32 A), B, barriers. wgmma reads 64 rows of x wherever they end: what it makes of
// others is not stored.
#pragma once

#include "few/sm90_load.cuh"
#include "few/sm90_shape.cuh"

namespace fastlora::sm90 {

// ---- Multiplying --------------------------------------------------------------------------------

// high + low = (v0, v1) to twice the digits of T, and twice its range: shares of an h that T can
// hold may be more than that. Infinities and NaN stay.
template <class T>
__device__ __forceinline__ void split_pair(float v0, float v1, uint32_t& high, uint32_t& low) {
  constexpr float kMost = std::is_same_v<T, __half> ? 65504.f : 3.3895313892515355e38f;
  high = pack<T>(fminf(fmaxf(v0, -kMost), kMost), fminf(fmaxf(v1, -kMost), kMost));
  const float2 held = unpack<T>(high);
  low = pack<T>(v0 - held.x, v1 - held.y);
}

// y, and h where it is stored, straight from the accumulators.
template <class T, class Shape>
__device__ __forceinline__ void few_store(const FewWork<Shape>& work,
                                          const float (&acc)[Shape::kC / 2],
                                          const float (&low)[Shape::kN / 2], int warp, int lane) {
  const FewArgs& args = work.args;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = work.row0 + warp * 16 + half * 8 + lane / 4;
    if (row >= args.m) continue;
    T* const y = static_cast<T*>(args.y) + int64_t{row} * args.n;
#pragma unroll
    for (int i = 0; i < Shape::kC / 8; ++i) {
      const int column = work.col0 + 8 * i + lane % 4 * 2;
      if (column >= args.n) break;
      float2 add = {0, 0};
      if (args.bias != nullptr) {
        const T* const bias = static_cast<const T*>(args.bias) + column;
        add = {static_cast<float>(bias[0]), static_cast<float>(bias[1])};
      }
      *reinterpret_cast<uint32_t*>(y + column) =
          pack<T>(acc[4 * i + 2 * half] + add.x, acc[4 * i + 2 * half + 1] + add.y);
    }
    if (work.tile_n != 0) continue;
    T* const h = static_cast<T*>(args.h) + int64_t{row} * args.rank;
#pragma unroll
    for (int i = 0; i < Shape::kN / 8; ++i) {
      const int rank = 8 * i + lane % 4 * 2;
      if (rank >= args.rank) break;
      *reinterpret_cast<uint32_t*>(h + rank) =
          pack<T>(low[4 * i + 2 * half], low[4 * i + 2 * half + 1]);
    }
  }
}

// Stores y and h, or leaves the CTA's share of y, and of h where it is stored, in shared memory.
template <class T, class Shape>
__device__ __forceinline__ void few_consume(FewWork<Shape> work, int warp, int lane) {
  const FewArgs& args = work.args;
  constexpr int kC = Shape::kC, kN = Shape::kN;
  float all[(kC + kN) / 2];  // A lies behind W: one product makes both
#pragma unroll 1
  for (int i = 0; i < work.steps; ++i) {
    const uint64_t x = descriptor_k_major(work.x());
    const uint64_t w = Shape::kMnMajor ? descriptor_mn_major(work.w(), kFewSlabBytes)
                                       : descriptor_k_major(work.w());
    mbarrier_wait(work.full(), work.phase);
    if constexpr (Shape::kFloatA) mbarrier_wait(work.rounded(), work.phase);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      constexpr uint64_t kNextW = Shape::kMnMajor ? kNextK16MnMajor : kNextK16;
      Wgmma<kC + kN>::template ss<T, 0, Shape::kMnMajor>(all, x + j * kNextK16, w + j * kNextW,
                                                         i > 0 || j > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && lane < args.cluster_m) {
      mbarrier_arrive_remote(work.previous_empty(), work.split * args.cluster_m + lane);
    }
    work.advance();
  }
  wgmma_wait<0>();
  pin(all);

  const float factor = args.scaling == nullptr ? args.scale : args.scale * __ldg(args.scaling);
  float acc[kC / 2], low[kN / 2];
#pragma unroll
  for (int i = 0; i < kC / 2; ++i) acc[i] = all[i];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {  // four of every 8 ranks; past the last, x may have met 0
    low[i] = i / 4 * 8 < args.rank ? all[kC / 2 + i] * factor : 0;
  }
  constexpr uint64_t kNextB = Shape::kMnMajor ? kNextK16MnMajor : kNextK16;
  const uint64_t b =
      Shape::kMnMajor ? descriptor_mn_major(work.b(), kN * 128) : descriptor_k_major<kN>(work.b());
  mbarrier_wait(work.b_there(), 0);
#pragma unroll
  for (int c = 0; c < kN / 16; ++c) {  // the layout of D is that of A
    uint32_t whole[4], rest[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      split_pair<T>(low[8 * c + 2 * j], low[8 * c + 2 * j + 1], whole[j], rest[j]);
    }
    wgmma_fence();
    Wgmma<kC>::template rs<T, Shape::kMnMajor>(acc, whole, b + c * kNextB, true);
    Wgmma<kC>::template rs<T, Shape::kMnMajor>(acc, rest, b + c * kNextB, true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
  }

  if (args.splits == 1) return few_store<T, Shape>(work, acc, low, warp, lane);
  named_barrier_sync(1, 128);  // the ring is no longer read
  const uint32_t row = warp * 16 + lane / 4, column = lane % 4 * 2;
  const auto lay = [&](uint32_t at, float v0, float v1) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(work.base + at), "f"(v0), "f"(v1)
                 : "memory");
  };
#pragma unroll
  for (int i = 0; i < kC / 8; ++i) {
    const uint32_t at = (row * Shape::kPitch + 8 * i + column) * 4;
    lay(at, acc[4 * i], acc[4 * i + 1]);
    lay(at + 8 * Shape::kPitch * 4, acc[4 * i + 2], acc[4 * i + 3]);
  }
  if (work.tile_n != 0) return;
#pragma unroll
  for (int i = 0; i < kN / 8; ++i) {
    const uint32_t at = Shape::kLowOffset + (row * kN + 8 * i + column) * 4;
    lay(at, low[4 * i], low[4 * i + 1]);
    lay(at + 8 * kN * 4, low[4 * i + 2], low[4 * i + 3]);
  }
}

// ---- Adding up ----------------------------------------------------------------------------------

// The sum of what all CTAs that share K have at `at`, in their order.
template <class Shape>
__device__ __forceinline__ float4 sum_shares(const FewWork<Shape>& work, uint32_t at) {
  float4 share[kMostSplits];
#pragma unroll
  for (int i = 0; i < kMostSplits; ++i) {
    if (i >= work.args.splits) break;
    const uint32_t from = address_in(work.base + at, i * work.args.cluster_m + work.row_part);
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(share[i].x), "=f"(share[i].y), "=f"(share[i].z), "=f"(share[i].w)
                 : "r"(from)
                 : "memory");
  }
  float4 sum = share[0];
#pragma unroll
  for (int i = 1; i < kMostSplits; ++i) {
    if (i >= work.args.splits) break;
    sum.x += share[i].x;
    sum.y += share[i].y;
    sum.z += share[i].z;
    sum.w += share[i].w;
  }
  return sum;
}

template <class T, class Shape>
__device__ __forceinline__ void few_finish(const FewWork<Shape>& work) {
  const FewArgs& args = work.args;
  constexpr int kN = Shape::kN;
  const int rows = min(kFewRows, args.m - work.row0);
  const int width = Shape::kC / args.splits;
  for (int i = static_cast<int>(threadIdx.x); i < rows * (width / 4); i += kFewThreads) {
    const int row = i / (width / 4);
    const int local = work.split * width + i % (width / 4) * 4, column = work.col0 + local;
    if (column >= args.n) continue;
    float4 sum = sum_shares(work, (row * Shape::kPitch + local) * 4);
    if (args.bias != nullptr) {
      const T* const bias = static_cast<const T*>(args.bias) + column;
      sum.x += static_cast<float>(bias[0]);
      sum.y += static_cast<float>(bias[1]);
      sum.z += static_cast<float>(bias[2]);
      sum.w += static_cast<float>(bias[3]);
    }
    T* const to = static_cast<T*>(args.y) + int64_t{work.row0 + row} * args.n + column;
    *reinterpret_cast<uint2*>(to) = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
  }
  if (work.tile_n != 0 || work.split != 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < rows * (kN / 4); i += kFewThreads) {
    const int row = i / (kN / 4), rank = i % (kN / 4) * 4;
    if (rank >= args.rank) continue;
    const float4 sum = sum_shares(work, Shape::kLowOffset + i * 16);
    T* const to = static_cast<T*>(args.h) + int64_t{work.row0 + row} * args.rank + rank;
    *reinterpret_cast<uint2*>(to) = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kFewThreads, 2)
    few_kernel(const __grid_constant__ FewMaps maps, const __grid_constant__ FewArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const FewWork<Shape> work(args, shared_address(shared));
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // tells the compiler: uniform
  const int lane = threadIdx.x % 32;
  work.start(maps);
  if (warp == 0) {
    if (lane == 0) few_produce(work, maps);
  } else if (warp < 4) {
    few_side<T>(work, threadIdx.x - 32, lane);
  } else {
    few_consume<T>(work, warp - 4, lane);
  }
  if (args.splits > 1) {
    work.sync();
    few_finish<T>(work);
  }
  work.sync();  // others may still read this CTA's shares, or arrive at its barriers
}

}  // namespace fastlora::sm90
