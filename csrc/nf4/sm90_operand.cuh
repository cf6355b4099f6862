// From codes in shared memory to the operand of a warp: what y = x W^T and dX = dY W differ in for
// the warps that multiply (sm90_consumer.cuh).
#pragma once

#include <type_traits>

#include "common/sm90/copy_async.cuh"
#include "common/sm90/wgmma.cuh"
#include "nf4/sm90_shape.cuh"

namespace fastlora::sm90 {

template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t product;
  if constexpr (std::is_same_v<T, __half>) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  } else {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  }
  return product;
}

template <class T, class Tile, bool kBack = Tile::kBack>
struct Nf4Operand;

// Forward: rows of the operand are rows of W, which are contiguous along the contraction.
template <class T, class Tile>
struct Nf4Operand<T, Tile, false> : Nf4Cta<Tile> {
  using Base = Nf4Cta<Tile>;
  using Base::args, Base::memory, Base::base, Base::warp, Base::lane;
  using Words = uint32_t[2][4];
  using Scales = uint32_t[2];

  // The first of the thread's two columns of y, of the CTA's: rows g and g + 8 of the operand.
  __device__ __forceinline__ int own_column() const { return (warp - 4) * 16 + lane / 4 * 2; }

  // The codes of 32 k of the thread's features: two bytes of every eight are its own.
  __device__ __forceinline__ void load_words(Words& words, int stage, int half) const {
    // TMA's swizzle of 32 bytes.
    const uint32_t chunk = (half ^ (lane / 8 & 1)) * 16;
    const uint32_t from = base + Tile::kCodes + stage * Tile::kCodeBytes + own_column() * 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) load_shared(words[i], from + i * 32 + chunk);
  }
  // Where the thread's pairs of scales are in a step, from its first on.
  __device__ __forceinline__ uint32_t own_scales() const {
    return base + Tile::kScales + own_column() * 4;
  }
  // A warp's operands for two wgmmas, but for the scales.
  __device__ __forceinline__ void look_up(uint32_t (&found)[2][4], const Words& words) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // neighbouring features, then 8 k further
        found[s][e] = table_entry<Tile::kShift>(memory + Tile::kTable, words[e % 2][2 * s + e / 2],
                                                lane % 4, lane * 4);
      }
    }
  }
  __device__ __forceinline__ static void apply_scales(uint32_t (&weights)[2][4],
                                                      const uint32_t (&found)[2][4],
                                                      const Scales& scales) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[s][e] = multiply_pair<T>(found[s][e], scales[e % 2]);
      }
    }
  }

  // Ranks `rank` and the next of B, for feature `own`.
  __device__ __forceinline__ uint32_t pair_of_b(int64_t own, int rank) const {
    float value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t at = own * args.rank + rank + e;
      const bool there = own < args.n && rank + e < args.rank;
      value[e] = !there              ? 0.0f
                 : args.factor_float ? __ldg(static_cast<const float*>(args.factor) + at)
                                     : wide(static_cast<const T*>(args.factor)[at]);
    }
    return pack2<T>(value[0], value[1]);
  }
  // 16 ranks of the thread's features, from `rank` on.
  __device__ __forceinline__ void load_factor(uint32_t (&out)[4], int rank) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = pair_of_b(this->column + own_column() + e % 2, rank + e / 2 * 8 + lane % 4 * 2);
    }
  }
};

// Backward: rows of the operand are columns of W. A byte has two of them, of one row of W; the
// operand wants two rows of W in a register. ldmatrix, which takes two bytes for an element, gives
// a lane the same two bytes of two rows that follow each other. Two warps share them: each has one.
template <class T, class Tile>
struct Nf4Operand<T, Tile, true> : Nf4Cta<Tile> {
  using Base = Nf4Cta<Tile>;
  using Base::args, Base::memory, Base::base, Base::warp, Base::lane;
  using Words = uint32_t[4];
  using Scales = uint32_t[4];

  // The first of the thread's two columns of dX, of the CTA's: those of its byte.
  __device__ __forceinline__ int own_column() const {
    return (warp - 4) / 2 * 32 + lane / 4 * 4 + warp % 2 * 2;
  }

  // Word i: two bytes of row 8 i + 2 (lane % 4) of half a step's 32, and those of the next.
  __device__ __forceinline__ void load_words(Words& words, int stage, int half) const {
    // TMA's swizzle of 64 bytes.
    const uint32_t chunk = ((warp - 4) / 2 ^ (lane / 2 & 3)) * 16;
    ldmatrix_x4_trans(
        words, base + Tile::kCodes + stage * Tile::kCodeBytes + half * 2048 + lane * 64 + chunk);
  }
  // Where the pairs of scales of these rows are in a step; of its second half 64 bytes further.
  __device__ __forceinline__ uint32_t own_scales() const {
    return base + Tile::kScales + ((warp - 4) / 4 * 8 + lane % 4) * 16;
  }
  // By words the two columns of a row, and of the next.
  __device__ __forceinline__ void look_up(uint32_t (&found)[2][4], const Words& words) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        found[i / 2][i % 2 * 2 + e] =
            table_entry<Tile::kShift>(memory + Tile::kTable, words[i], warp % 2 + 2 * e, lane * 4);
      }
    }
  }
  // A warp's operands for two wgmmas: of a column two rows.
  __device__ __forceinline__ static void apply_scales(uint32_t (&weights)[2][4],
                                                      const uint32_t (&found)[2][4],
                                                      const Scales& scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 rows further
      const uint32_t* const pair = found[i / 2] + i % 2 * 2;
      uint32_t* const to = weights[i / 2] + i % 2 * 2;
      to[0] = multiply_pair<T>(__byte_perm(pair[0], pair[1], 0x5410), scales[i]);
      to[1] = multiply_pair<T>(__byte_perm(pair[0], pair[1], 0x7632), scales[i]);
    }
  }

  // The thread's columns of A, ranks `rank` and the next.
  __device__ __forceinline__ void pairs_of_a(uint32_t& first, uint32_t& second, int rank) const {
    const int64_t own = this->column + own_column();
    float2 value[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t at = (rank + e) * int64_t{args.columns} + own;
      if (own >= args.columns || rank + e >= args.rank) {
        value[e] = {0.0f, 0.0f};
      } else if (args.factor_float) {
        value[e] =
            __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(args.factor) + at));
      } else {
        value[e] = unpack<T>(
            __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(args.factor) + at)));
      }
    }
    first = pack2<T>(value[0].x, value[1].x);
    second = pack2<T>(value[0].y, value[1].y);
  }
  // 16 ranks of the thread's columns, from `rank` on.
  __device__ __forceinline__ void load_factor(uint32_t (&out)[4], int rank) const {
    pairs_of_a(out[0], out[1], rank + lane % 4 * 2);
    pairs_of_a(out[2], out[3], rank + lane % 4 * 2 + 8);
  }
};

}  // namespace fastlora::sm90
