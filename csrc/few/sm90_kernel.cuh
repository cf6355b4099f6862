// y [m, n] = x W^T + bias + h B^T and h = s x A^T for few rows on Hopper: W comes from memory once,
// and nothing else takes longer.
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
// Shared memory: stages x (x: up to 64 rows, W: kC, A: kN, of 128 bytes each; an fp32 A: kN x 256
// more), B, barriers. wgmma reads 64 rows of x wherever they end: what it makes of others is not
// stored.
#pragma once

#include <cuda.h>

#include "common/index.cuh"
#include "common/sm90/cluster.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"

namespace fastlora::sm90 {

constexpr int kFewRows = 64, kFewDepth = 64;  // of x in a tile, of K in a step
constexpr int kFewThreads = 256, kFewSideWarps = 3;
constexpr int kMostSplits = 8;

// kColumns of a tile, kRanks (16 or 64) that the rank is padded to, kFloat: A is fp32.
template <int kColumns, int kRanks, bool kFloat>
struct FewShape {
  static constexpr int kC = kColumns, kN = kRanks;
  static constexpr bool kFloatA = kFloat;
  static constexpr int kWBytes = kC * 128, kABytes = kN * (kFloat ? 128 + 256 : 128);
  static constexpr int kLoadedABytes = kN * (kFloat ? 256 : 128);
  static constexpr int kBBytes = kC * kN * 2;
  static constexpr int kPitch = kC + 8;  // fp32, of a share of y in shared memory: no conflicts
  static constexpr int kLowOffset = kFewRows * kPitch * 4;  // of a share of h behind it
  static constexpr int kStageBarriers = 24;                 // bytes; and one barrier more

  FASTLORA_HOST_DEVICE static constexpr int slot_bytes(int x_bytes) {
    return x_bytes + kWBytes + kABytes;
  }
  FASTLORA_HOST_DEVICE static constexpr int shared_bytes(int x_bytes, int stages) {
    return stages * (slot_bytes(x_bytes) + kStageBarriers) + kBBytes + 8;
  }
};

struct FewMaps {
  CUtensorMap x, w, a;
};

struct FewArgs {
  int m, n, rank;
  int k_steps;            // of 64
  int cluster_m, splits;  // powers of two
  int tiles_n;
  int stages, x_bytes;
  const void* b;
  int64_t b_pitch;
  bool b_float;
  const void* bias;
  float scale;
  const float* scaling;
  void *y, *h;
};

// What a CTA does, and its ring.
template <class Shape>
struct FewWork {
  const FewArgs& args;
  uint32_t base;
  int cta, row_part, split;  // rank in the cluster, and its parts
  int tile_n, row0, col0;
  int first, steps;  // of K
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ FewWork(const FewArgs& args, uint32_t base) : args(args), base(base) {
    cta = static_cast<int>(cluster_rank());
    row_part = cta % args.cluster_m;
    split = cta / args.cluster_m;
    const int tile = static_cast<int>(blockIdx.x) / (args.cluster_m * args.splits);
    const int tile_m = tile / args.tiles_n;
    tile_n = tile - tile_m * args.tiles_n;
    row0 = (tile_m * args.cluster_m + row_part) * kFewRows;
    col0 = tile_n * Shape::kC;
    first = args.k_steps * split / args.splits;
    steps = args.k_steps * (split + 1) / args.splits - first;
  }

  __device__ __forceinline__ uint32_t slot(int of_stage) const {
    return base + of_stage * Shape::slot_bytes(args.x_bytes);
  }
  __device__ __forceinline__ uint32_t x() const { return slot(stage); }
  __device__ __forceinline__ uint32_t w() const { return x() + args.x_bytes; }
  __device__ __forceinline__ uint32_t a() const { return w() + Shape::kWBytes; }
  __device__ __forceinline__ uint32_t float_a() const { return a() + Shape::kN * 128; }
  __device__ __forceinline__ uint32_t b() const { return slot(args.stages); }
  __device__ __forceinline__ uint32_t barriers(int of_stage) const {
    return b() + Shape::kBBytes + of_stage * Shape::kStageBarriers;
  }
  __device__ __forceinline__ uint32_t full() const { return barriers(stage); }
  __device__ __forceinline__ uint32_t empty() const { return barriers(stage) + 8; }
  __device__ __forceinline__ uint32_t previous_empty() const {
    return barriers(stage == 0 ? args.stages - 1 : stage - 1) + 8;
  }
  __device__ __forceinline__ uint32_t rounded() const { return barriers(stage) + 16; }
  __device__ __forceinline__ uint32_t b_there() const { return barriers(args.stages); }
  __device__ __forceinline__ void advance() {
    if (++stage == args.stages) {
      stage = 0;
      phase ^= 1;
    }
  }

  __device__ __forceinline__ void start(const FewMaps& maps) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < args.stages; ++i) {
        mbarrier_init(barriers(i), 1);
        mbarrier_init(barriers(i) + 8, 4 * args.cluster_m);
        mbarrier_init(barriers(i) + 16, 1);
      }
      mbarrier_init(b_there(), kFewSideWarps);
      fence_mbarrier_init();
      prefetch_tensor_map(&maps.x);
      prefetch_tensor_map(&maps.w);
      prefetch_tensor_map(&maps.a);
    }
    if (args.cluster_m > 1) {
      cluster_sync();  // no load may arrive before the barriers are there
    } else {
      __syncthreads();
    }
  }

  // All threads of the cluster, warps whole.
  __device__ __forceinline__ void sync() const {
    __syncwarp();
    if (args.cluster_m * args.splits > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
};

// ---- Loading ------------------------------------------------------------------------------------

template <class Shape>
__device__ __forceinline__ void few_produce(FewWork<Shape> work, const FewMaps& maps) {
  const FewArgs& args = work.args;
  const auto peers =
      static_cast<uint16_t>(((1 << args.cluster_m) - 1) << (work.split * args.cluster_m));
  constexpr int kN = Shape::kN;
  const int w_rows = Shape::kC / args.cluster_m, w_row = work.row_part * w_rows;
  const int a_rows = max(8, kN / args.cluster_m), a_row = work.row_part * a_rows;
  for (int i = 0; i < work.steps; ++i) {
    const int k = (work.first + i) * kFewDepth;
    mbarrier_wait(work.empty(), work.phase ^ 1);
    const uint32_t full = work.full();
    mbarrier_arrive_expect(full, args.x_bytes + Shape::kWBytes + Shape::kLoadedABytes);
    const auto load = [&](uint32_t to, const CUtensorMap* map, int column, int row) {
      if (args.cluster_m == 1) {
        tma_load_2d(to, map, full, column, row);
      } else {
        tma_load_2d_multicast(to, map, full, column, row, peers);
      }
    };
    load(work.w() + w_row * 128, &maps.w, k, work.col0 + w_row);
    tma_load_2d(work.x(), &maps.x, full, k, work.row0);
    if (a_row < kN) {
      if constexpr (Shape::kFloatA) {
        load(work.float_a() + a_row * 128, &maps.a, k, a_row);
        load(work.float_a() + (kN + a_row) * 128, &maps.a, k + 32, a_row);
      } else {
        load(work.a() + a_row * 128, &maps.a, k, a_row);
      }
    }
    work.advance();
  }
}

// Eight values from global or shared memory as eight of T.
template <class T>
__device__ __forceinline__ uint4 round8(float4 low, float4 high) {
  return {pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y),
          pack<T>(high.z, high.w)};
}
__device__ __forceinline__ float4 load_shared_float4(uint32_t shared) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_16(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Where chunk `at` of 8 ranks of row `row` of B lies: [kC, kN], K-major for the tensor cores.
template <class Shape>
__device__ __forceinline__ uint32_t b_offset(int row, int at) {
  constexpr int kRowBytes = Shape::kN * 2;
  return swizzled<kRowBytes>(row * kRowBytes + at * 16);
}

// A [kN, 64] of a step from fp32 (two boxes of 32 columns) to T, by a warp.
template <class T, class Shape>
__device__ __forceinline__ void round_a(uint32_t to, uint32_t from, int lane) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = lane; first < Shape::kN * 8; first += kAtOnce * 32) {
    float4 values[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = (first + 32 * i) / 8, at = first % 8;  // 8 columns of a row
      const uint32_t box = from + at / 4 * Shape::kN * 128;
      const uint32_t offset = row * 128 + at % 4 * 32;
      values[i][0] = load_shared_float4(box + swizzled<128>(offset));
      values[i][1] = load_shared_float4(box + swizzled<128>(offset + 16));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = (first + 32 * i) / 8, at = first % 8;
      store_shared_16(to + swizzled<128>(row * 128 + at * 16),
                      round8<T>(values[i][0], values[i][1]));
    }
  }
}

// The side warps: B, then A [kN, 64] of every step to 16 bits, if it is fp32.
template <class T, class Shape>
__device__ __forceinline__ void few_side(FewWork<Shape> work, int thread, int lane) {
  const FewArgs& args = work.args;
  constexpr int kN = Shape::kN, kRowChunks = kN / 8;  // of 8 ranks
  const auto done = [&](uint32_t barrier) {
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };
#pragma unroll 4
  for (int chunk = thread; chunk < Shape::kC * kRowChunks; chunk += kFewSideWarps * 32) {
    const int local = chunk / kRowChunks, at = chunk % kRowChunks;
    const int64_t from = int64_t{work.col0 + local} * args.b_pitch + at * 8;
    uint4 value = {0, 0, 0, 0};
    if (work.col0 + local < args.n && at * 8 < args.rank) {
      if (args.b_float) {
        const auto* const b =
            reinterpret_cast<const float4*>(static_cast<const float*>(args.b) + from);
        value = round8<T>(__ldg(b), __ldg(b + 1));
      } else {
        value = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.b) + from));
      }
    }
    store_shared_16(work.b() + b_offset<Shape>(local, at), value);
  }
  done(work.b_there());
  if constexpr (Shape::kFloatA) {
    for (int i = 0; i < work.steps; ++i, work.advance()) {
      if (work.stage % kFewSideWarps != thread / 32) continue;  // a warp has whole stages
      mbarrier_wait(work.full(), work.phase);
      round_a<T, Shape>(work.a(), work.float_a(), lane);
      done(work.rounded());
    }
  }
}

// ---- Multiplying --------------------------------------------------------------------------------

// high + low = (v0, v1) to twice the digits of T, and twice its range: shares of an h that T can
// hold may be more than that. Infinities and NaN stay.
template <class T>
__device__ __forceinline__ void split_pair(float v0, float v1, uint32_t& high, uint32_t& low) {
  constexpr float kMost = std::is_same_v<T, __half> ? 65504.f : 3.3895313892515355e38f;
  high = pack<T>(fminf(fmaxf(v0, -kMost), kMost), fminf(fmaxf(v1, -kMost), kMost));
  float h0, h1;
  if constexpr (std::is_same_v<T, __half>) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&high));
    h0 = both.x;
    h1 = both.y;
  } else {
    h0 = __uint_as_float(high << 16);
    h1 = __uint_as_float(high & 0xFFFF0000);
  }
  low = pack<T>(v0 - h0, v1 - h1);
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
    const uint64_t w = descriptor_k_major(work.w());
    mbarrier_wait(work.full(), work.phase);
    if constexpr (Shape::kFloatA) mbarrier_wait(work.rounded(), work.phase);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Wgmma<kC + kN>::template ss<T, 0, 0>(all, x + j * kNextK16, w + j * kNextK16, i > 0 || j > 0);
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
  const uint64_t b = descriptor_k_major<kN>(work.b());
  mbarrier_wait(work.b_there(), 0);
#pragma unroll
  for (int c = 0; c < kN / 16; ++c) {  // the layout of D is that of A
    uint32_t whole[4], rest[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      split_pair<T>(low[8 * c + 2 * j], low[8 * c + 2 * j + 1], whole[j], rest[j]);
    }
    wgmma_fence();
    Wgmma<kC>::template rs<T, 0>(acc, whole, b + c * kNextK16, true);
    Wgmma<kC>::template rs<T, 0>(acc, rest, b + c * kNextK16, true);
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
    uint32_t from;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(from)
                 : "r"(work.base + at), "r"(i * work.args.cluster_m + work.row_part));
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
