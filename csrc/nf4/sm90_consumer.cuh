// The computing half of the Hopper linear over 4-bit weights (sm90_kernel.cuh): two warpgroups that
// decode and multiply 64 columns of y each, and store them.
#pragma once

#include "common/sm90/cluster.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/wgmma.cuh"
#include "nf4/sm90_operand.cuh"

namespace fastlora::sm90 {

template <class T, class Tile>
struct Nf4Consumer : Nf4Operand<T, Tile> {
  using Base = Nf4Operand<T, Tile>;
  using Base::args, Base::memory, Base::base, Base::column, Base::row, Base::begin, Base::end;
  using Base::load_words, Base::look_up, Base::apply_scales, Base::load_factor, Base::own_column;
  using Base::part;
  using Base::warp, Base::lane, Base::full, Base::empty, Base::h_full, Base::h_empty, Base::advance;

  // While a half of a step multiplies, the next one is looked up and the codes of that after it are
  // on their way: nobody waits for shared memory, which the tensor cores keep busy.
  __device__ __forceinline__ void multiply(float (&acc)[Tile::kRows / 2]) const {
    using Product = Wgmma<Tile::kRows>;
    int stage = 0, next = 0, previous = 0;
    uint32_t phase = 0;
    typename Base::Words words;
    typename Base::Scales scales;
    uint32_t found[2][4], weights[2][2][4];
    const uint32_t own_scales = Base::own_scales();
    mbarrier_wait(full(0), 0);
    load_words(words, 0, 0);
    load_shared(scales, own_scales);
    look_up(found, words);
    load_words(words, 0, 1);
#pragma unroll 1
    for (int j = begin; j < end; ++j) {
      const uint64_t x = descriptor_k_major(base + stage * Tile::kXBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        apply_scales(weights[half], found, scales);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          Product::template rs<T, 0>(acc, weights[half][s], x + (2 * half + s) * kNextK16,
                                     j > begin || half + s > 0);
        }
        wgmma_commit();
        look_up(found, words);
        if (half == 0) {
          if (Tile::kBack) load_shared(scales, own_scales + stage * Tile::kScaleBytes + 64);
          if (j + 1 < end) advance(next, phase);  // or the last step once more: there is no next
          mbarrier_wait(full(next), phase);
        } else {
          load_shared(scales, own_scales + next * Tile::kScaleBytes);
        }
        load_words(words, next, half);
        wgmma_wait<1>();  // the half before: its operands may be written again
        if (half == 0 && j > begin) mbarrier_arrive(empty(previous));
      }
      previous = stage;
      stage = next;
    }
    wgmma_wait<0>();
    pin(acc);
  }

  // acc += factor h^T; `factor` has the first 16 ranks.
  __device__ __forceinline__ void add_update(float (&acc)[Tile::kRows / 2],
                                             uint32_t (&factor)[4]) const {
    uint32_t phase = 0;
#pragma unroll 1
    for (int rank = 0; rank < args.rank; rank += 16, phase ^= 1) {
      if (rank > 0) load_factor(factor, rank);
      mbarrier_wait(h_full(), phase);
      wgmma_fence();
      Wgmma<Tile::kRows>::template rs<T, 0>(acc, factor, descriptor_k_major<16>(base + Tile::kH),
                                            true);
      wgmma_commit();
      wgmma_wait<0>();
      pin(acc);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(h_empty());
    }
  }

  // The thread's sums into shared memory: columns of y are neighbours there.
  __device__ __forceinline__ void put(const float (&acc)[Tile::kRows / 2]) const {
    named_barrier_sync(1, kNf4Math);
    float* const to = reinterpret_cast<float*>(memory) + own_column();
#pragma unroll
    for (int i = 0; i < Tile::kRows / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        *reinterpret_cast<float2*>(to + (8 * i + lane % 4 * 2 + e) * Tile::kPitch) =
            make_float2(acc[4 * i + e], acc[4 * i + 2 + e]);
      }
    }
  }

  // All of k in this CTA: straight from registers, 16 neighbours of a row to a warp.
  __device__ __forceinline__ void store(const float (&acc)[Tile::kRows / 2]) const {
    const int64_t own = column + own_column();
    if (own >= args.columns) return;
    const auto* const given = static_cast<const T*>(args.bias);
    const bool two = own + 1 < args.columns, whole = two && args.columns % 2 == 0;
    const float bias[2] = {given == nullptr ? 0.0f : wide(given[own]),
                           given == nullptr || !two ? 0.0f : wide(given[own + 1])};
    const int first = row + lane % 4 * 2;
    T* to = static_cast<T*>(args.y) + int64_t{first} * args.columns + own;
#pragma unroll
    for (int i = 0; i < Tile::kRows / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + 8 * i + e >= args.m) return;
        const float y[2] = {acc[4 * i + e] + bias[0], acc[4 * i + 2 + e] + bias[1]};
        T* const at = to + e * int64_t{args.columns};
        if (whole) {
          *reinterpret_cast<uint32_t*>(at) = pack2<T>(y[0], y[1]);
        } else {
          at[0] = static_cast<T>(y[0]);
          if (two) at[1] = static_cast<T>(y[1]);
        }
      }
      to += 8 * int64_t{args.columns};
    }
  }

  // The CTA's share of the tile, added up: every warp 128 columns of a row, four to a lane.
  __device__ __forceinline__ void store_share() const {
    const int64_t own = column + lane * 4;
    const bool whole = args.columns % 4 == 0 && own + 3 < args.columns;
    float bias[4] = {};
    if (args.bias != nullptr) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (own + e < args.columns) bias[e] = wide(static_cast<const T*>(args.bias)[own + e]);
      }
    }
#pragma unroll 2
    for (int i = (warp - 4) * args.splits + part; i < Tile::kRows && row + i < args.m;
         i += args.splits * kNf4Math / 32) {
      const uint32_t from = base + (i * Tile::kPitch + lane * 4) * 4;
      float4 sums[kNf4MostSplits];
#pragma unroll
      for (int s = 0; s < kNf4MostSplits; ++s) {
        if (s >= args.splits) break;
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(sums[s].x), "=f"(sums[s].y), "=f"(sums[s].z), "=f"(sums[s].w)
                     : "r"(address_in(from, s))
                     : "memory");
      }
      float y[4] = {sums[0].x, sums[0].y, sums[0].z, sums[0].w};
#pragma unroll
      for (int s = 1; s < kNf4MostSplits; ++s) {
        if (s >= args.splits) break;
        y[0] += sums[s].x, y[1] += sums[s].y, y[2] += sums[s].z, y[3] += sums[s].w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] += bias[e];
      T* const to = static_cast<T*>(args.y) + int64_t{row + i} * args.columns + own;
      if (whole) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3]));
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (own + e < args.columns) to[e] = static_cast<T>(y[e]);
      }
    }
  }
};

}  // namespace fastlora::sm90
