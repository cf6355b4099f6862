// The loading half of the Hopper GEMM (sm90_kernel.cuh): one thread that keeps the ring full.
#pragma once

#include "common/sm90/mbarrier.cuh"
#include "common/sm90/tma.cuh"
#include "gemm/sm90_shape.cuh"

namespace fastlora::sm90 {

// No load carries an L2 cache policy: with one (even "evict normal") the SMs that ask for the same
// box at the same time are no longer served together, and L2 traffic doubles.

// One step of the ring: k .. k + 63 of x and W, or of h and L, of which kDepth 16 loads 16.
template <class Tile, bool kMnMajor, int kDepth>
__device__ __forceinline__ void load_step(const Ring<Tile>& ring, const GemmArgs& args,
                                          const CUtensorMap* x, const CUtensorMap* w, int k,
                                          int row, int col, int cta) {
  constexpr uint16_t kBoth = 3;
  const uint32_t full = ring.full();
  constexpr int kBytes = kDepth * 2;  // of a row
  // Boxes count whole, also beyond the edges.
  mbarrier_arrive_expect(full, (Tile::kM + Tile::kN) * kBytes);

  if (args.cluster_n == 1) {
    tma_load_2d(ring.x(), x, full, k, row);
  } else {
    const int half = cta * (Tile::kM / 2);
    tma_load_2d_multicast(ring.x() + half * kBytes, x, full, k, row + half, kBoth);
  }

  if constexpr (kMnMajor) {  // one box for every 64 columns; two CTAs take turns
    for (int slab = args.cluster_m == 1 ? 0 : cta; slab < Tile::kN / 64; slab += args.cluster_m) {
      const uint32_t to = ring.w() + slab * kSlabBytes;
      if (args.cluster_m == 1) {
        tma_load_2d(to, w, full, col + slab * 64, k);
      } else {
        tma_load_2d_multicast(to, w, full, col + slab * 64, k, kBoth);
      }
    }
  } else if (args.cluster_m == 1) {
    tma_load_2d(ring.w(), w, full, k, col);
  } else {
    const int half = cta * (Tile::kN / 2);
    tma_load_2d_multicast(ring.w() + half * kBytes, w, full, k, col + half, kBoth);
  }
}

// All steps of a tile, the rank's kRankDepth deep. `ahead` is called at every one (of how many),
// `before_rank` before the first load of h and L.
template <class Tile, bool kMnMajor, bool kMasked, int kRankDepth, class Ahead, class BeforeRank>
__device__ __forceinline__ void produce_tile(const GemmMaps& maps, const GemmArgs& args,
                                             Ring<Tile>& ring, int cta, int row, int col,
                                             Ahead& ahead, BeforeRank before_rank) {
  const int steps = args.k_steps + args.rank_steps;
  const int first_low = kMasked ? 0 : args.k_steps;
  for (int step = 0; step < steps; ++step) {
    const bool low = kMasked ? step < args.rank_steps : step >= args.k_steps;
    const int skipped = low == kMasked ? 0 : kMasked ? args.rank_steps : args.k_steps;
    if (low && step == first_low) before_rank();
    ahead(step, steps);
    mbarrier_wait(ring.empty(), ring.phase ^ 1);
    const int k = (step - skipped) * kBlockK;
    if (low) {
      load_step<Tile, kMnMajor, kRankDepth>(ring, args, &maps.h, &maps.l, k, row, col, cta);
    } else {
      load_step<Tile, kMnMajor, kBlockK>(ring, args, &maps.x, &maps.w, k, row, col, cta);
    }
    ring.advance();
  }
}

template <class Tile, bool kMnMajor, bool kMasked>
__device__ __forceinline__ void produce(const GemmMaps& maps, const GemmArgs& args, uint32_t base,
                                        int cta, int first, int stride) {
  Ring<Tile> ring{base};
  const auto nothing = [](int, int) {};
  for (int tile = first; tile < args.tiles_m * args.tiles_n; tile += stride) {
    int row, col;
    locate<Tile>(args, tile, cta, row, col);
    produce_tile<Tile, kMnMajor, kMasked, kBlockK>(maps, args, ring, cta, row, col, nothing, [] {});
  }
}

}  // namespace fastlora::sm90
