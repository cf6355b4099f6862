// What the two halves of the Hopper GEMM (sm90_kernel.cuh) agree on: how tiles are cut and walked,
// the arguments, and the ring of shared memory between them.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastlora::sm90 {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 40;  // 40 + 2 * 232 = 3 * 168, what 384 threads start with
constexpr int kConsumerRegisters = 232;
constexpr int kConsumerWarps = 8;
constexpr int kBlockK = 64;           // 128 bytes: one swizzle atom
constexpr int kRowBytes = 128;        // of a slab
constexpr int kSlabBytes = 8192;      // 64 x 64 elements
constexpr int kWarpSlabBytes = 2048;  // 16 x 64 elements, what a warp stores at once
constexpr int kSharedMemory = 232448;

template <int kBlockM, int kBlockN>
struct Tile {
  static constexpr int kM = kBlockM, kN = kBlockN;
  // The part of one consumer warpgroup.
  static constexpr bool kSplitN = kBlockM == 64;
  static constexpr int kGroupM = kSplitN ? kBlockM : kBlockM / 2;
  static constexpr int kGroupN = kSplitN ? kBlockN / 2 : kBlockN;
  static constexpr int kWgmmas = kGroupM / 64;  // stacked, to multiply 16 of k
  static constexpr int kValues = kGroupN / 2;   // accumulators of a thread in each
  static constexpr int kXBytes = kBlockM * kRowBytes, kWBytes = kBlockN * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kStagingBytes = kConsumerWarps * 2 * kWarpSlabBytes;
  static constexpr int kMostStages = (kSharedMemory - 1024 - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kBarrierOffset = kStages * kStageBytes + kStagingBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kStages * 16;
  static_assert(kStages >= 3 && kWgmmas * kValues <= 128 && kGroupN % 64 == 0);
};

struct GemmMaps {
  CUtensorMap x, w, h, l, y;
};

struct GemmArgs {
  int m, n, rank;
  int k_steps, rank_steps;   // of 64
  int cluster_m, cluster_n;  // 1 or 2, not both 2
  int tiles_m, tiles_n;      // of whole clusters
  int group_m;               // rows of such tiles walked together
  const void* bias;
  const uint32_t* mask;
  int64_t mask_pitch;
};

// From the cluster's tile to that of its CTA.
template <class Tile>
__device__ __forceinline__ void shift_tile(const GemmArgs& args, int cta, int& row, int& col) {
  if (args.cluster_m == 2) row += cta * Tile::kM;
  if (args.cluster_n == 2) col += cta * Tile::kN;
}

// First row and column of the tile of CTA `cta` of the cluster, in cluster tile `index`: these go
// down group_m rows, then to the next column.
template <class Tile>
__device__ __forceinline__ void locate(const GemmArgs& args, int index, int cta, int& row,
                                       int& col) {
  const int group_tiles = args.group_m * args.tiles_n;
  const int group = index / group_tiles;
  const int first = group * args.group_m;
  const int height = min(args.tiles_m - first, args.group_m);
  const int within = index - group * group_tiles;
  const int tile_n = within / height;
  row = (first + within - tile_n * height) * args.cluster_m * Tile::kM;
  col = tile_n * args.cluster_n * Tile::kN;
  shift_tile<Tile>(args, cta, row, col);
}

// The ring: every slot has a barrier "full" (the producer arrives once, TMA counts its bytes) and
// one "empty" (all consumer warps of the cluster arrive, as a slot is overwritten in all CTAs at
// once).
template <class Tile>
struct Ring {
  uint32_t base;  // shared address
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ uint32_t x() const { return base + stage * Tile::kStageBytes; }
  __device__ __forceinline__ uint32_t w() const { return x() + Tile::kXBytes; }
  __device__ __forceinline__ uint32_t full() const {
    return base + Tile::kBarrierOffset + stage * 16;
  }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t previous_empty() const {
    const int previous = stage == 0 ? Tile::kStages - 1 : stage - 1;
    return base + Tile::kBarrierOffset + previous * 16 + 8;
  }
};

}  // namespace fastlora::sm90
