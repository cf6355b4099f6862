// The loading half of the Hopper linear over 4-bit weights (sm90_kernel.cuh): x, codes, scales and
// h.
#pragma once

#include "common/sm90/cluster.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/pdl.cuh"
#include "common/sm90/tma.cuh"
#include "nf4/sm90_shape.cuh"

namespace fastlora::sm90 {

template <class T, class Tile>
struct Nf4Producer : Nf4Cta<Tile> {
  using Base = Nf4Cta<Tile>;
  using Base::args, Base::memory, Base::base, Base::column, Base::row, Base::begin, Base::end;
  using Base::warp, Base::lane, Base::full, Base::empty, Base::h_full, Base::h_empty, Base::advance;

  __device__ __forceinline__ void load(const Nf4Maps& maps) const {
    int stage = 0;
    uint32_t phase = 0;
    for (int j = begin; j < end; ++j) {
      mbarrier_wait(empty(stage), phase ^ 1);
      mbarrier_arrive_expect(full(stage), Tile::kXBytes + Tile::kCodeBytes);
      const int own = static_cast<int>(column);
      tma_load_2d(base + Tile::kCodes + stage * Tile::kCodeBytes, &maps.codes, full(stage),
                  Tile::kBack ? own / 2 : j * 32, Tile::kBack ? j * 64 : own);
      tma_load_2d(base + stage * Tile::kXBytes, &maps.x, full(stage), j * 64, row);
      advance(stage, phase);
    }
  }

  // Scales of four blocks that follow each other in a row, as they are loaded.
  struct Scales {
    float absmax[4];  // or nested_absmax in the first, of
    uint32_t codes;   // four of them
  };
  __device__ __forceinline__ Scales load_scales(int block) const {
    Scales s{};
    if (args.scales.absmax != nullptr) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(args.scales.absmax + block));
      s.absmax[0] = four.x, s.absmax[1] = four.y, s.absmax[2] = four.z, s.absmax[3] = four.w;
    } else {
      s.absmax[0] = __ldg(args.scales.nested_absmax + (block >> args.scales.nested_shift));
      s.codes = __ldg(reinterpret_cast<const uint32_t*>(args.scales.codes + block));
    }
    return s;
  }

  static constexpr int kLanes = kScaleWarps * 32;

  // What the warps that make scales ask for before anything else: behind a ring's worth of codes of
  // every CTA it would come microseconds later.
  static constexpr int kAhead =
      4;  // steps of dX, whose rows are far apart, and so are their scales
  struct Early {
    float offset, values[4];  // of quantised scales
    Scales four[2];           // of forward: a lane has two neighbouring features,
    Scale one[kAhead][2];     // of dX: one row of W in a step, in the blocks of both halves
  };
  __device__ __forceinline__ bool nested() const { return args.scales.absmax == nullptr; }
  __device__ __forceinline__ int thread() const { return (warp - 1) * 32 + lane; }
  // Of forward.
  __device__ __forceinline__ int first_scale(int i) const {
    return static_cast<int>(min(column + thread() * 2 + i, int64_t{args.n} - 1)) * args.blocks;
  }
  __device__ __forceinline__ int first_block() const {
    return begin >> (args.block_shift - 6) & ~3;
  }
  // Of dX. Where there is no row or column a scale is 0, and not a neighbour's, which may be
  // infinite.
  __device__ __forceinline__ bool has_scale(int j, int i) const {
    return j < end && j * 64 + thread() < args.n && column + 64 * i < args.columns;
  }
  __device__ __forceinline__ void load_scales_back(Scale (&to)[2], int j) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (has_scale(j, i)) {
        const int block = static_cast<int>(column + 64 * i >> args.block_shift);
        to[i] = load_scale(args.scales, (j * 64 + thread()) * args.blocks + block);
      }
    }
  }

  __device__ __forceinline__ Early ask_early() const {
    Early early{};
    if constexpr (Tile::kBack) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_scales_back(early.one[i], begin + i);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) early.four[i] = load_scales(first_scale(i) + first_block());
    }
    if (nested()) {
      early.offset = *args.scales.offset;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        early.values[i] = args.scales.nested_code[i * kLanes + thread()];
      }
    }
    return early;
  }
  __device__ __forceinline__ void make_scales(Early& early) const {
    if (nested()) {
      auto* const to = reinterpret_cast<float*>(memory + Tile::kNested);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i * kLanes + thread()] = early.values[i];
      named_barrier_sync(2, kLanes);
    }
    if constexpr (Tile::kBack) {
      make_scales_back(early.one, early.offset);
    } else {
      make_scales_forward(early.four, early.offset);
    }
  }

  __device__ __forceinline__ void make_scales_forward(Scales (&ahead)[2], float offset) const {
    static_assert(2 * kLanes == kNf4Columns);
    const int shift = args.block_shift - 6, last = (end - 1) >> shift;
    const auto* const nested_code = reinterpret_cast<const float*>(memory + Tile::kNested);
    int stage = 0, j = begin;
    uint32_t phase = 0;
    const uint32_t to = base + Tile::kScales + thread() * 8;
    for (int block = first_block(); block <= last; block += 4) {
      uint32_t both[4];  // features of a block
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Scale one = {nested() ? ahead[i].absmax[0] : ahead[i].absmax[a],
                             ahead[i].codes >> (8 * a) & 0xFF};
          scale[i] = make_scale(one, nested(), nested_code, offset);
        }
        both[a] = pack2<T>(scale[0], scale[1]);
      }
      if (block + 4 <= last) {
#pragma unroll
        for (int i = 0; i < 2; ++i) ahead[i] = load_scales(first_scale(i) + block + 4);
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const uint32_t pairs[2] = {__byte_perm(both[a], 0, 0x1010),
                                   __byte_perm(both[a], 0, 0x3232)};
        const int until = min(end, (block + a + 1) << shift);
        for (; j < until; ++j) {
          mbarrier_wait(empty(stage), phase ^ 1);
          store_shared(to + stage * Tile::kScaleBytes, pairs);
          mbarrier_arrive(full(stage));
          advance(stage, phase);
        }
      }
    }
  }

  __device__ __forceinline__ void make_scales_back(Scale (&ahead)[kAhead][2], float offset) const {
    static_assert(kLanes == kNf4BlockK && Tile::kScaleBytes == kLanes * 2 * sizeof(T));
    const auto* const nested_code = reinterpret_cast<const float*>(memory + Tile::kNested);
    // Pairs of a lane of the consumers are together: rows 2 (lane % 4) + {0, 1} + 8 {0, 1, 2, 3}.
    char* const to = memory + Tile::kScales + (thread() / 32 * 4 + thread() / 2 % 4) * 16 +
                     thread() / 8 % 4 * 4 + thread() % 2 * 2;
    int stage = 0;
    uint32_t phase = 0;
    for (int j = begin; j < end; j += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (j + a >= end) break;
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scale[i] =
              has_scale(j + a, i) ? make_scale(ahead[a][i], nested(), nested_code, offset) : 0.0f;
        }
        load_scales_back(ahead[a], j + a + kAhead);
        mbarrier_wait(empty(stage), phase ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<T*>(to + stage * Tile::kScaleBytes + i * 128) =
              static_cast<T>(scale[i]);
        }
        mbarrier_arrive(full(stage));
        advance(stage, phase);
      }
    }
  }

  // h, 16 ranks at a time.
  __device__ __forceinline__ void load_h() const {
    const auto* const h = static_cast<const T*>(args.h);
    const bool whole = args.rank % 8 == 0 && reinterpret_cast<uintptr_t>(h) % 16 == 0;
    pdl_wait();
    uint32_t phase = 0;
    for (int rank = 0; rank < args.rank; rank += 16, phase ^= 1) {
      mbarrier_wait(h_empty(), phase ^ 1);
#pragma unroll 4
      for (int i = lane; i < Tile::kRows * 2; i += 32) {  // 8 ranks of a row
        const int at = row + i / 2, r = rank + i % 2 * 8;
        const T* const from = h + int64_t{at} * args.rank + r;
        uint32_t eight[4] = {};
        if (at < args.m && whole && r < args.rank) {
          const uint4 loaded = *reinterpret_cast<const uint4*>(from);
          eight[0] = loaded.x, eight[1] = loaded.y, eight[2] = loaded.z, eight[3] = loaded.w;
        } else if (at < args.m && !whole) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            eight[e] = pack2<T>(r + 2 * e < args.rank ? wide(from[2 * e]) : 0.0f,
                                r + 2 * e + 1 < args.rank ? wide(from[2 * e + 1]) : 0.0f);
          }
        }
        store_shared(base + Tile::kH + swizzled<32>(i * 16), eight);
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(h_full());
    }
  }
};

}  // namespace fastlora::sm90
