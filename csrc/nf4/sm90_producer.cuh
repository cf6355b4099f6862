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
  using Base::args, Base::memory, Base::base, Base::feature, Base::row, Base::begin, Base::end;
  using Base::warp, Base::lane, Base::full, Base::empty, Base::h_full, Base::h_empty, Base::advance;

  __device__ __forceinline__ void load(const Nf4Maps& maps) const {
    int stage = 0;
    uint32_t phase = 0;
    for (int j = begin; j < end; ++j) {
      mbarrier_wait(empty(stage), phase ^ 1);
      mbarrier_arrive_expect(full(stage), Tile::kXBytes + Tile::kCodeBytes);
      tma_load_2d(base + Tile::kCodes + stage * Tile::kCodeBytes, &maps.codes, full(stage), j * 32,
                  static_cast<int>(feature));
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

  // A lane has two neighbouring features.
  __device__ __forceinline__ void make_scales() const {
    constexpr int kLanes = kScaleWarps * 32;
    static_assert(2 * kLanes == kNf4Features);
    const int thread = (warp - 1) * 32 + lane, shift = args.block_shift - 6;
    const bool nested = args.scales.absmax == nullptr;
    auto* const nested_code = reinterpret_cast<float*>(memory + Tile::kNested);
    const int last = (end - 1) >> shift;
    int first[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = static_cast<int>(min(feature + thread * 2 + i, int64_t{args.n} - 1)) * args.blocks;
    }
    int block = begin >> shift & ~3;
    Scales ahead[2] = {load_scales(first[0] + block), load_scales(first[1] + block)};
    float offset = 0;
    if (nested) {
      offset = *args.scales.offset;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = args.scales.nested_code[i * kLanes + thread];
#pragma unroll
      for (int i = 0; i < 4; ++i) nested_code[i * kLanes + thread] = values[i];
      named_barrier_sync(2, kLanes);
    }
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
