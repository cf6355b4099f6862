// The computing half of the Hopper GEMM (sm90_kernel.cuh): two warpgroups that multiply what is in
// the ring, each its part of the tile, and store it.
#pragma once

#include <cstddef>
#include <type_traits>

#include "common/sm90/cluster.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "gemm/sm90_shape.cuh"

namespace fastlora::sm90 {

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

  // The words of register i, and the register made of them; apart, because they take a microsecond.
  __device__ __forceinline__ void fetch(uint32_t (&words)[8], const GemmArgs& args, int row,
                                        int col, int j, int i) const {
    const int columns = (args.n + 7) / 8, rows = (args.m + 31) / 32 * 8;
    const int at = row + 64 * j;
    const int unit_row = at / 32 * 8 + at % 8;
    const int first = col / 8 + 8 * i;
    const uint32_t* const source = args.mask + unit_row * args.mask_pitch + first;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      words[e] = 0;
      // Through L2: it may have been written during this kernel.
      if (unit_row < rows && first + e < columns) words[e] = __ldcg(source + e);
    }
  }
  __device__ __forceinline__ static uint32_t pack(const uint32_t (&words)[8], int row, int lane) {
    const int shift = row % 32 / 8 * 8 + lane % 4 * 2;
    uint32_t packed = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t word = words[e] >> shift;  // this row's bits in 0, 1; the next one's in 8, 9
      packed |= ((word & 3) | (word >> 6 & 12)) << (4 * e);
    }
    return packed;
  }

  // The next register, in a loop: all move up one place, so that none is chosen by an index.
  __device__ __forceinline__ void shift_in(const uint32_t (&words)[8], int row, int lane) {
    uint32_t* const all = &bits[0][0];
#pragma unroll
    for (int i = 0; i + 1 < Tile::kWgmmas * kRegisters; ++i) all[i] = all[i + 1];
    all[Tile::kWgmmas * kRegisters - 1] = pack(words, row, lane);
  }

  __device__ __forceinline__ void load(const GemmArgs& args, int row, int col, int lane) {
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        uint32_t words[8];
        fetch(words, args, row, col, j, i);
        bits[j][i] = pack(words, row, lane);
      }
    }
  }
};

// Slots with h and L are kRankDepth deep: 64, or 16 for ranks up to 16.
template <class T, class Tile, bool kMnMajor, bool kMasked, int kRankDepth = kBlockK>
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

  // The accumulators hold nothing that matters: otherwise they keep their registers between tiles,
  // for the first wgmma of a tile names them as inputs, too.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
#pragma unroll
      for (float& value : acc[j]) value = 0;
      pin(acc[j]);
    }
  }

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

  // Where the warpgroup's operands in the slot begin, which is kDepth deep.
  template <int kDepth>
  __device__ __forceinline__ uint64_t from_x(int j = 0) const {
    const int row = (Tile::kSplitN ? 0 : group * Tile::kGroupM) + j * 64;
    return descriptor_k_major<kDepth>(ring.x() + row * kDepth * 2);
  }
  template <int kDepth>
  __device__ __forceinline__ uint64_t from_w() const {
    const int col = Tile::kSplitN ? group * Tile::kGroupN : 0;
    return kMnMajor ? descriptor_mn_major(ring.w() + col * kRowBytes, kSlabBytes)
                    : descriptor_k_major<kDepth>(ring.w() + col * kDepth * 2);
  }

  // One slot of the ring, kDepth deep, or the first kPieces x 16 of it: leaves its multiplication
  // in flight; the slot before it is then free. `accumulate` false: the accumulators start from
  // zero.
  template <int kDepth, int kPieces = kDepth / 16>
  __device__ __forceinline__ void step(bool accumulate, bool first) {
    constexpr uint64_t kNextW = kMnMajor ? kNextK16MnMajor : kNextK16;
    const uint64_t x = from_x<kDepth>(), w = from_w<kDepth>();
    mbarrier_wait(ring.full(), ring.phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kWgmmas; ++j) {
        Wgmma<Tile::kGroupN>::template ss<T, 0, kMnMajor>(
            acc[j], x + i * kNextK16 + j * (64 * kDepth * 2 >> 4), w + i * kNextW,
            accumulate || i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
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
    for (int i = 0; i < args.k_steps; ++i) step<kBlockK>(accumulate || i > 0, i == 0);
  }

  // All of them, and the mask meanwhile: its words are under way while the tensor cores work. False
  // where there are too few steps for that.
  __device__ __forceinline__ bool base_steps_with(MaskBits<Tile>& mask, int row, int col) {
    constexpr int kRounds = Tile::kWgmmas * MaskBits<Tile>::kRegisters;
    const int before = args.k_steps - 2 * kRounds;
    if (before < 1) {
      base_steps(false);
      return false;
    }
#pragma unroll 1
    for (int i = 0; i < before; ++i) step<kBlockK>(i > 0, i == 0);
#pragma unroll 1
    for (int i = 0; i < kRounds; ++i) {
      constexpr int kEach = MaskBits<Tile>::kRegisters;
      uint32_t words[8];
      mask.fetch(words, args, row, col, i / kEach, i % kEach);
      step<kBlockK>(true, false);
      step<kBlockK>(true, false);
      mask.shift_in(words, row, lane);
    }
    return true;
  }

  __device__ __forceinline__ void rank_steps(bool accumulate) {
#pragma unroll 1
    for (int i = 0; i < args.rank_steps; ++i) {
      const bool more = accumulate || i > 0, first = !accumulate && i == 0;
      if constexpr (kRankDepth == 16) {
        step<16>(more, first);
      } else {
        const int pieces = min(4, (args.rank - i * kBlockK + 15) / 16);
        if (pieces == 4) {  // straight-line code each: a loop makes ptxas serialise wgmma
          step<kBlockK>(more, first);
        } else if (pieces == 3) {
          step<kBlockK, 3>(more, first);
        } else if (pieces == 2) {
          step<kBlockK, 2>(more, first);
        } else {
          step<kBlockK, 1>(more, first);
        }
      }
    }
  }

  // 64 columns of h L^T, from the slot of the ring that holds h and L; kPieces x 16 ranks.
  template <int kPieces>
  __device__ __forceinline__ void rank_product(float (&low)[32], int j, int slab_column) const {
    static_assert(kMnMajor && !Tile::kSplitN);
    const uint64_t x = from_x<kRankDepth>(j);
    const uint64_t w = descriptor_mn_major(ring.w() + slab_column * kSlabBytes, kSlabBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      Wgmma<64>::template ss<T, 0, 1>(low, x + i * kNextK16, w + i * kNextK16MnMajor, i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(low);
  }

  // What is added to 64 columns of a tile before they are stored: mask o (h L^T).
  __device__ __forceinline__ void masked_rank(float (&low)[32], const MaskBits<Tile>& mask, int j,
                                              int slab_column) const {
    const int pieces = (args.rank + 15) / 16;
    if (kRankDepth == 16 || pieces == 1) {
      rank_product<1>(low, j, slab_column);
    } else if (pieces == 2) {
      rank_product<2>(low, j, slab_column);
    } else if (pieces == 3) {
      rank_product<3>(low, j, slab_column);
    } else {
      rank_product<4>(low, j, slab_column);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (!(mask.bits[j][slab_column] >> i & 1)) low[i] = 0;
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

  // The warp's 16 rows x 64 columns at `row`, `col`, rounded and stored: no warp waits for another.
  // `value(i)`: the i-th of the thread's 32, four of every 8 columns.
  template <class Value>
  __device__ __forceinline__ void store_slab(const CUtensorMap& map, int row, int col,
                                             Value value) {
    // Lanes give row lane % 16, and of a pair of 16-byte chunks lane / 16.
    const uint32_t lane_row = lane % 16 * kRowBytes;
    if (lane == 0) tma_wait_read<1>();  // the slab was read: only the other one may still be
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        packed[i] = pack<T>(value(4 * c + 2 * i), value(4 * c + 2 * i + 1));
      }
      const uint32_t chunk = (c + lane / 16) ^ (lane % 8);  // the 128-byte swizzle
      stmatrix_x4(staging + slab + lane_row + chunk * 16, packed[0], packed[1], packed[2],
                  packed[3]);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      if (row < args.m && col < args.n) tma_store_2d(&map, staging + slab, col, row);
      tma_commit();  // also an empty group: the wait above counts
    }
    slab ^= kWarpSlabBytes;
  }

  // `each(j, s, row, col)` for the warp's slabs: s-th 64 columns of wgmma j. `row`, `col`: where
  // this warpgroup's part of the tile starts.
  template <class Each>
  __device__ __forceinline__ void for_slabs(int row, int col, Each each) const {
#pragma unroll
    for (int j = 0; j < Tile::kWgmmas; ++j) {
#pragma unroll
      for (int s = 0; s < Tile::kGroupN / 64; ++s) {
        each(j, s, row + 64 * j + 16 * warp, col + 64 * s);
      }
    }
  }

  __device__ __forceinline__ void store(const uint32_t (&bias)[Tile::kGroupN / 8], int row,
                                        int col) {
    store(bias, row, col, nullptr);
  }

  // The same with more to add: `more(j, s, low)` makes what comes to 64 columns of wgmma j; or
  // nullptr.
  template <class More>
  __device__ __forceinline__ void store(const uint32_t (&bias)[Tile::kGroupN / 8], int row, int col,
                                        More more) {
    for_slabs(row, col, [&](int j, int s, int to_row, int to_col) {
      constexpr bool kMore = !std::is_same_v<More, std::nullptr_t>;
      [[maybe_unused]] float low[32];
      if constexpr (kMore) more(j, s, low);
      store_slab(maps.y, to_row, to_col, [&](int i) {
        const float2 add = unpack<T>(bias[8 * s + i / 4]);
        float sum = acc[j][32 * s + i] + (i % 2 == 0 ? add.x : add.y);
        if constexpr (kMore) sum += low[i];
        return sum;
      });
    });
  }

  // bias + columns o the accumulators; and these themselves where there is a map `z`. Factors and
  // bias are loaded for 64 columns at a time: there are no registers for more.
  __device__ __forceinline__ void store_scaled(const float* columns, const CUtensorMap* z, int row,
                                               int col) {
    for_slabs(row, col, [&](int j, int s, int to_row, int to_col) {
      uint32_t bias[8];
      float2 factor[8];
      const int first = to_col + lane % 4 * 2;
      load_bias(bias, args, first);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // n is a multiple of 8
        factor[i] = make_float2(0, 0);
        if (first + 8 * i < args.n) {
          factor[i] = __ldg(reinterpret_cast<const float2*>(columns + first + 8 * i));
        }
      }
      if (z != nullptr) {
        store_slab(*z, to_row, to_col, [&](int i) { return acc[j][32 * s + i]; });
      }
      store_slab(maps.y, to_row, to_col, [&](int i) {
        const float2 add = unpack<T>(bias[i / 4]), by = factor[i / 4];
        const float value = acc[j][32 * s + i];
        return i % 2 == 0 ? fmaf(value, by.x, add.x) : fmaf(value, by.y, add.y);
      });
    });
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
