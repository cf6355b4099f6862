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

  // The values of quantised scales to shared memory, by the warps that make them: their offset.
  __device__ __forceinline__ float load_nested(float* nested_code) const {
    const int thread = (warp - 1) * 32 + lane;
    const float offset = *args.scales.offset;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = args.scales.nested_code[i * kLanes + thread];
#pragma unroll
    for (int i = 0; i < 4; ++i) nested_code[i * kLanes + thread] = values[i];
    named_barrier_sync(2, kLanes);
    return offset;
  }

  // A lane has two neighbouring features.
  __device__ __forceinline__ void make_scales() const {
    static_assert(2 * kLanes == kNf4Columns);
    const int thread = (warp - 1) * 32 + lane, shift = args.block_shift - 6;
    const bool nested = args.scales.absmax == nullptr;
    auto* const nested_code = reinterpret_cast<float*>(memory + Tile::kNested);
    const int last = (end - 1) >> shift;
    int first[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = static_cast<int>(min(column + thread * 2 + i, int64_t{args.n} - 1)) * args.blocks;
    }
    int block = begin >> shift & ~3;
    Scales ahead[2] = {load_scales(first[0] + block), load_scales(first[1] + block)};
    const float offset = nested ? load_nested(nested_code) : 0.0f;
    int stage = 0, j = begin;
    uint32_t phase = 0;
    const uint32_t to = base + Tile::kScales + thread * 8;
    for (; block <= last; block += 4) {
      uint32_t both[4];  // features of a block
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Scale one = {nested ? ahead[i].absmax[0] : ahead[i].absmax[a],
                             ahead[i].codes >> (8 * a) & 0xFF};
          scale[i] = make_scale(one, nested, nested_code, offset);
        }
        both[a] = pack2<T>(scale[0], scale[1]);
      }
      if (block + 4 <= last) {
#pragma unroll
        for (int i = 0; i < 2; ++i) ahead[i] = load_scales(first[i] + block + 4);
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

  // Of dX: a lane has one row of W in a step, in the blocks of both halves of the tile's columns.
  // Where there is no row or column a scale is 0, and not a neighbour's, which may be infinite.
  __device__ __forceinline__ void make_scales_back() const {
    constexpr int kAhead = 4;  // steps: rows are far apart, and so are their scales
    static_assert(kLanes == kNf4BlockK && Tile::kScaleBytes == kLanes * 2 * sizeof(T));
    const int thread = (warp - 1) * 32 + lane;
    const bool nested = args.scales.absmax == nullptr;
    auto* const nested_code = reinterpret_cast<float*>(memory + Tile::kNested);
    int block[2];
    bool there[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      block[i] = static_cast<int>(column + 64 * i >> args.block_shift);
      there[i] = column + 64 * i < args.columns;
    }
    Scale ahead[kAhead][2] = {};
    const auto load = [&](Scale(&to)[2], int j) {
      const int64_t at = j * 64 + thread;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (j < end && at < args.n && there[i]) {
          to[i] = load_scale(args.scales, static_cast<int>(at) * args.blocks + block[i]);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(ahead[i], begin + i);
    const float offset = nested ? load_nested(nested_code) : 0.0f;

    // Pairs of a lane of the consumers are together: rows 2 (lane % 4) + {0, 1} + 8 {0, 1, 2, 3}.
    char* const to = memory + Tile::kScales + (thread / 32 * 4 + thread / 2 % 4) * 16 +
                     thread / 8 % 4 * 4 + thread % 2 * 2;
    int stage = 0;
    uint32_t phase = 0;
    for (int j = begin; j < end; j += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (j + a >= end) break;
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool given = (j + a) * 64 + thread < args.n && there[i];
          scale[i] = given ? make_scale(ahead[a][i], nested, nested_code, offset) : 0.0f;
        }
        load(ahead[a], j + a + kAhead);
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
