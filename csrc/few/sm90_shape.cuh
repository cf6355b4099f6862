// What the parts of the kernel for few rows (sm90_kernel.cuh) agree on: shapes, arguments, and the
// ring of shared memory between them.
#pragma once

#include <cuda.h>

#include "common/index.cuh"
#include "common/sm90/cluster.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/tma.cuh"

namespace fastlora::sm90 {

constexpr int kFewRows = 64, kFewDepth = 64;  // of x in a tile, of K in a step
constexpr int kFewSlabBytes = kFewDepth * 128;
constexpr int kFewThreads = 256, kFewSideWarps = 3;
constexpr int kMostSplits = 8;

// kColumns of a tile, kRanks (16 or 64) that the rank is padded to, kFloat: A is fp32, kMn: W, A
// and B are contiguous along n and the rank, not along k (backward): slabs of 64 columns then, of
// 64 k each, and one of A.
template <int kColumns, int kRanks, bool kFloat, bool kMn>
struct FewShape {
  static constexpr int kC = kColumns, kN = kRanks;
  static constexpr bool kFloatA = kFloat, kMnMajor = kMn;
  static constexpr int kWBytes = kC * 128;
  static constexpr int kRoundBytes = kMn ? kFewSlabBytes : kN * 128;  // of A in 16 bits
  static constexpr int kBoxBytes = kMn ? kFewSlabBytes : kN * 128;    // of fp32, 32 columns wide
  static constexpr int kBoxes = kMn ? (kN + 31) / 32 : 2;
  static constexpr int kABytes = kRoundBytes + (kFloat ? kBoxes * kBoxBytes : 0);
  static constexpr int kLoadedABytes = kFloat ? kBoxes * kBoxBytes : kRoundBytes;
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
  __device__ __forceinline__ uint32_t float_a() const { return a() + Shape::kRoundBytes; }
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

}  // namespace fastlora::sm90
