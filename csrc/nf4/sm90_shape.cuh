// What the halves of the Hopper linear over 4-bit weights (sm90_kernel.cuh) agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "nf4/decode.cuh"

namespace fastlora::sm90 {

constexpr int kNf4Threads = 384;
constexpr int kNf4Math = 256;     // of them, the last ones
constexpr int kNf4Columns = 128;  // of y in a tile
constexpr int kNf4MostSplits = 8;
constexpr int kScaleWarps = 2;

// Of y [m, n] = x W^T, or of dX [m, k] = dY W. Then y is dX everywhere here, x is dY and h is g,
// and a step takes 64 n.
template <int kRowsOfX, bool kBackward>
struct Nf4Tile {
  static constexpr int kRows = kRowsOfX;
  static constexpr bool kBack = kBackward;
  static constexpr int kCtas = kRows <= 64 ? 2 : 1;  // an SM
  static constexpr int kXBytes = kRows * 128;
  static constexpr int kCodeBytes = kNf4Columns * kNf4BlockK / 2;
  // A pair of its scale for every column, or the scales of 64 rows of W in two blocks.
  static constexpr int kScaleBytes = kBack ? 64 * 2 * 2 : kNf4Columns * 4;
  static constexpr int kShift = kRows == 64 ? 7 : 8, kTableBytes = 256 << kShift;
  static constexpr int kHBytes = kRows * 32;  // 16 ranks
  static constexpr int kFixedBytes = kTableBytes + kHBytes + 256 * 4 + 16 * 4 + 16;
  static constexpr int kBudget = (kCtas == 2 ? 113 : 227) * 1024 - 1024;
  static constexpr int kMost = (kBudget - kFixedBytes) / (kXBytes + kCodeBytes + kScaleBytes + 16);
  static constexpr int kStages = kMost < 12 ? kMost : 12;
  // Where things are: the ring's three parts, the table, h, the codes' values, barriers.
  static constexpr int kCodes = kStages * kXBytes;
  static constexpr int kScales = kCodes + kStages * kCodeBytes;
  static constexpr int kTable = kScales + kStages * kScaleBytes;
  static constexpr int kH = kTable + kTableBytes;
  static constexpr int kNested = kH + kHBytes;
  static constexpr int kValues = kNested + 256 * 4;
  static constexpr int kBarriers = kValues + 16 * 4;
  static constexpr int kBytes = kBarriers + kStages * 16 + 16;
  // The sums of a part of k, at last, in place of x and codes: a row of them to a row of x.
  static constexpr int kPitch = kNf4Columns + 8;
  static_assert(kStages >= 4 && kRows * kPitch * 4 <= kScales && kBytes <= kBudget);
};

struct Nf4Maps {
  CUtensorMap x, codes;
};

struct Nf4Args {
  int m, n, rank;
  int steps;    // of 64 k, or n
  int splits;   // parts of these, CTAs of a cluster
  int tiles_m;  // of rows of x; neighbours share columns
  Nf4Scales scales;
  int block_shift, blocks;  // of a row of W
  CodeBook book;
  const void* factor;  // B [n, rank], or A [rank, k]
  bool factor_float;
  const void *bias, *h;
  void* y;
  int columns;  // of y: n, or k
};

// The part of a tile that a CTA has, and its barriers: every slot of the ring has one "full" (TMA
// and the warps that make scales) and one "empty" (the warps that multiply), h's slot as well.
template <class Tile>
struct Nf4Cta {
  const Nf4Args& args;
  char* memory;
  uint32_t base;        // its shared address
  int64_t column;       // of y
  int row, begin, end;  // of x; steps
  int part;             // of them
  int warp, lane;

  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + Tile::kBarriers + stage * 16;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ __forceinline__ uint32_t h_full() const { return full(Tile::kStages); }
  __device__ __forceinline__ uint32_t h_empty() const { return empty(Tile::kStages); }
  __device__ __forceinline__ static void advance(int& stage, uint32_t& phase) {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fastlora::sm90
