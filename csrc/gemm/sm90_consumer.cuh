// The computing half of the Hopper GEMM (sm90_kernel.cuh): two warpgroups that multiply what is in
// the ring, each its part of the tile, and store it.
#pragma once

#include <type_traits>

#include "common/sm90/cluster.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "gemm/sm90_shape.cuh"

namespace fastlora::sm90 {

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// Pairs of bias for the thread's columns: it has two of every eight, from `col` on.
template <int kPairs>
__device__ __forceinline__ void load_bias(uint32_t (&pairs)[kPairs], const GemmArgs& args,
                                          int col) {
  const auto* const bias = static_cast<const uint16_t*>(args.bias);
  if (bias != nullptr && col + 8 * (kPairs - 1) + 1 < args.n) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = __ldg(reinterpret_cast<const uint32_t*>(bias + col + 8 * i));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {  // no bias, or the last columns
    const int at = col + 8 * i;
    pairs[i] = 0;
    if (bias != nullptr && at < args.n) pairs[i] = __ldg(bias + at);
    if (bias != nullptr && at + 1 < args.n) pairs[i] |= uint32_t{__ldg(bias + at + 1)} << 16;
  }
}

// The thread's keep bits: of every 8 columns it has 2 in each of 2 rows, four bits of one mask word
// (8 columns x 4 rows). Eight such groups to a register. `row` is the thread's first row.
template <class Tile>
struct MaskBits {
  static constexpr int kRegisters = Tile::kGroupN / 64;
  uint32_t bits[Tile::kWgmmas][kRegisters];

  __device__ __forceinline__ void load(const GemmArgs& args, int row, int col, int lane) {
    const int columns = (args.n + 7) / 8, rows = (args.m + 31) / 32 * 8;
    const int shift = row % 32 / 8 * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
      const int at = row + 64 * j;
      const int unit_row = at / 32 * 8 + at % 8;
      const uint32_t* const source = args.mask + unit_row * args.mask_pitch;
      const int first = col / 8;
      const bool inside = unit_row < rows && first + 8 * kRegisters <= columns;
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        uint32_t words[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int c = first + 8 * i + e;
          words[e] = inside || (unit_row < rows && c < columns) ? __ldg(source + c) : 0;
        }
        uint32_t packed = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const uint32_t word =
              words[e] >> shift;  // this row's bits in 0, 1; the next one's in 8, 9
          packed |= ((word & 3) | (word >> 6 & 12)) << (4 * e);
        }
        bits[j][i] = packed;
      }
    }
  }
};

template <class T, class Tile, bool kMnMajor, bool kMasked>
struct Consumer {
  const GemmMaps& maps;
  const GemmArgs& args;
  Ring<Tile> ring;
  uint32_t staging;       // this warp's two slabs
  int group, warp, lane;  // warpgroup 0 or 1, warp within it
  uint32_t slab = 0;      // offset of the slab to store from next
  float acc[Tile::kWgmmas][Tile::kValues];

  __device__ __forceinline__ Consumer(const GemmMaps& maps, const GemmArgs& args, uint32_t base,
                                      int consumer_warp, int lane)
      : maps(maps),
        args(args),
        ring{base},
        staging(base + Tile::kStages * Tile::kStageBytes + consumer_warp * 2 * kWarpSlabBytes),
        group(consumer_warp / 4),
        warp(consumer_warp % 4),
        lane(lane) {}

  // Where this warpgroup's part of a tile begins.
  __device__ __forceinline__ int part_row() const {
    return Tile::kSplitN ? 0 : group * Tile::kGroupM;
  }
  __device__ __forceinline__ int part_col() const {
    return Tile::kSplitN ? group * Tile::kGroupN : 0;
  }

  __device__ __forceinline__ void release(uint32_t empty) const {
    if (args.cluster_m * args.cluster_n == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else if (lane < 2) {
      mbarrier_arrive_remote(empty, lane);
    }
  }

  // Starts the multiplication of the first kPieces x 16 of k of the slot.
  // `accumulate` false: the accumulators start from zero.
  template <int kPieces>
  __device__ __forceinline__ void multiply(uint64_t from_x, uint64_t from_w, bool accumulate) {
    constexpr uint64_t kNextW = kMnMajor ? kNextK16MnMajor : kNextK16;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kWgmmas; ++j) {
        Wgmma<Tile::kGroupN>::template ss<T, 0, kMnMajor>(
            acc[j], from_x + i * kNextK16 + j * (kSlabBytes >> 4), from_w + i * kNextW,
            accumulate || i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
  }

  // One slot of the ring, leaving its multiplication in flight; the slot before it is then free.
  template <bool kWhole>
  __device__ __forceinline__ void step(int pieces, bool accumulate, bool first) {
    const uint32_t x = ring.x() + (Tile::kSplitN ? 0 : group * Tile::kGroupM * kRowBytes);
    const uint32_t w = ring.w() + (Tile::kSplitN ? group * Tile::kGroupN * kRowBytes : 0);
    const uint64_t from_x = descriptor_k_major(x);
    const uint64_t from_w = kMnMajor ? descriptor_mn_major(w, kSlabBytes) : descriptor_k_major(w);
    mbarrier_wait(ring.full(), ring.phase);
    if (kWhole || pieces == 4) {  // straight-line code each: a loop makes ptxas serialise wgmma
      multiply<4>(from_x, from_w, accumulate);
    } else if (pieces == 3) {
      multiply<3>(from_x, from_w, accumulate);
    } else if (pieces == 2) {
      multiply<2>(from_x, from_w, accumulate);
    } else {
      multiply<1>(from_x, from_w, accumulate);
    }
    if (!first) release(ring.previous_empty());
    ring.advance();
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) pin(acc[j]);
    release(ring.previous_empty());
  }

  __device__ __forceinline__ void base_steps(bool accumulate) {
#pragma unroll 1
    for (int i = 0; i < args.k_steps; ++i) step<true>(4, accumulate || i > 0, i == 0);
  }

  __device__ __forceinline__ void rank_steps(bool accumulate) {
#pragma unroll 1
    for (int i = 0; i < args.rank_steps; ++i) {
      const int pieces = min(4, (args.rank - i * kBlockK + 15) / 16);
      step<false>(pieces, accumulate || i > 0, !accumulate && i == 0);
    }
  }

  __device__ __forceinline__ void apply_mask(const MaskBits<Tile>& mask) {
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i) {
        if (!(mask.bits[j][i / 32] >> (i % 32) & 1)) acc[j][i] = 0;
      }
      pin(acc[j]);
    }
  }

  // Rounds and stores, each warp its 16 rows x 64 columns at a time: no warp waits for another.
  // `row`, `col`: where this warpgroup's part starts.
  __device__ __forceinline__ void store(const uint32_t (&bias)[Tile::kGroupN / 8], int row,
                                        int col) {
    // Lanes give row lane % 16, and of a pair of 16-byte chunks lane / 16.
    const uint32_t lane_row = lane % 16 * kRowBytes;
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
#pragma unroll
      for (int s = 0; s < Tile::kGroupN / 64; ++s) {
        if (lane == 0) tma_wait_read<1>();  // the slab was read: only the other one may still be
        __syncwarp();
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
          uint32_t packed[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* const d = acc[j] + 32 * s + 4 * (c + i);
            const float2 add = unpack<T>(bias[8 * s + c + i]);
            packed[2 * i] = pack<T>(d[0] + add.x, d[1] + add.y);
            packed[2 * i + 1] = pack<T>(d[2] + add.x, d[3] + add.y);
          }
          const uint32_t chunk = (c + lane / 16) ^ (lane % 8);  // the 128-byte swizzle
          stmatrix_x4(staging + slab + lane_row + chunk * 16, packed[0], packed[1], packed[2],
                      packed[3]);
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
          const int to_row = row + 64 * j + 16 * warp, to_col = col + 64 * s;
          if (to_row < args.m && to_col < args.n) {
            tma_store_2d(&maps.y, staging + slab, to_col, to_row);
          }
          tma_commit();  // also an empty group: the wait above counts
        }
        slab ^= kWarpSlabBytes;
      }
    }
  }

  __device__ __forceinline__ void run(int cta, int first, int stride) {
    const int tiles = args.tiles_m * args.tiles_n;
    const int thread_row = warp * 16 + lane / 4;
    int row, col;
    MaskBits<Tile> mask;
    const auto prefetch = [&](int tile) {
      locate<Tile>(args, tile, cta, row, col);
      row += part_row();
      col += part_col();
      if constexpr (kMasked) mask.load(args, row + thread_row, col, lane);
    };
    if (first < tiles) prefetch(first);
    for (int tile = first; tile < tiles; tile += stride) {
      uint32_t bias[Tile::kGroupN / 8];
      load_bias(bias, args, col + lane % 4 * 2);
      if constexpr (kMasked) {
        rank_steps(false);
        finish();
        apply_mask(mask);
        base_steps(true);
      } else {
        base_steps(false);
        rank_steps(true);
      }
      finish();
      const int this_row = row, this_col = col;
      if (tile + stride < tiles) prefetch(tile + stride);  // in flight during the store
      store(bias, this_row, this_col);
    }
    if (lane == 0) tma_wait<0>();
  }
};

}  // namespace fastlora::sm90
