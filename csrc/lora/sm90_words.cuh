// The dropout mask of a low-rank linear (sm90_kernel.cuh), made in the same launch by the warps of
// the producer's warpgroup that have nothing else to do, and how the skinny products apply it.
//
// Words lie as common/philox.cuh says, and every 128 rows are announced when all of theirs are
// there.
#pragma once

#include "common/philox_parts.cuh"
#include "common/sm90/cluster.cuh"
#include "lora/sm90_shape.cuh"
#include "lora/sm90_sync.cuh"

namespace fastlora::sm90 {

// A chunk: the words of 32 rows in 32 columns of words, one a lane.
template <int kCalls>
__device__ __forceinline__ void make_words(const LoraArgs& args, int lane) {
  const LoraDropout& dropout = args.dropout;
  auto* const words = const_cast<uint32_t*>(args.gemm.mask);
  const int64_t pitch = args.gemm.mask_pitch;
  const PhiloxState state(static_cast<uint64_t>(dropout.rng_state[0]),
                          static_cast<uint64_t>(dropout.rng_state[dropout.rng_stride]));
  while (true) {
    int chunk = 0;
    if (lane == 0) chunk = static_cast<int>(atomicAdd(&args.counters->words, 1));
    chunk = __shfl_sync(0xFFFFFFFF, chunk, 0);
    const int rows = chunk / dropout.row_chunks;
    if (rows * 8 >= dropout.unit_rows) return;
    const int column = (chunk - rows * dropout.row_chunks) * 32 + lane;
    const int first = rows * 8;
    const PhiloxWordColumns<kCalls> columns(state, column);
    uint32_t* to = words + first * pitch + column;
#pragma unroll 2
    for (int row = first; row < first + 8; ++row, to += pitch) {
      const uint32_t word = keep_word<kCalls>(state, columns, state.row(row), dropout.keep);
      if (column < pitch) *to = word;
    }
    __threadfence();
    __syncwarp();
    if (lane == 0) add_release(args.counters->flags + args.flags + rows / 4);
  }
}

__device__ __forceinline__ void make_words(const LoraArgs& args, int lane) {
  with_calls(args.dropout.calls,
             [&](auto calls) { make_words<decltype(calls)::value>(args, lane); });
}

__device__ __forceinline__ const uint32_t* words_flag(const LoraArgs& args, int row) {
  return args.counters->flags + args.flags + row / 128;
}
// What it comes to: chunks of the 128 rows, or of fewer at the end.
__device__ __forceinline__ uint32_t all_chunks(const LoraArgs& args, int flag) {
  return min(4, args.dropout.unit_rows / 8 - flag * 4) * args.dropout.row_chunks;
}
// Whether all of the mask is made: one answer for a warpgroup (0 or 1), whose warps go on to the
// same wgmma instructions, as they must.
__device__ __forceinline__ bool all_words_are_there(const LoraArgs& args, int group) {
  bool there = true;
  for (int flag = static_cast<int>(threadIdx.x % 32); flag < args.flags; flag += 32) {
    there = there && load_acquire(words_flag(args, flag * 128)) == all_chunks(args, flag);
  }
  return named_barrier_all(1 + group, 128, there);
}
// By whole warps, for rows [first, last).
__device__ __forceinline__ void wait_words(const LoraArgs& args, int first, int last, int lane) {
  last = min(last, args.gemm.m);
  for (int row = first; row < last && lane == 0; row += 128) {
    wait_at_least(words_flag(args, row), all_chunks(args, row / 128));
  }
  __syncwarp();
}

// ---- Of x as the left operand of `down`: rows of the tile are rows of the mask ------------------

// A lane's words of a slot (128 of k): of unit row lane / 4 of the 32 rows its warp belongs to.
struct RowWords {
  uint4 word[4];

  __device__ __forceinline__ void load(const LoraArgs& args, int row0, int k0, int lane) {
    const int unit_row = min(row0 / 32 * 8 + lane / 4, args.dropout.unit_rows - 1);
    const auto* const from =
        reinterpret_cast<const uint4*>(args.gemm.mask + unit_row * args.gemm.mask_pitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = k0 / 32 + i;  // the pitch is a multiple of four words
      const bool there = row0 < args.gemm.m && at * 4 < args.gemm.mask_pitch;
      word[i] = there ? __ldcg(from + at) : uint4{0, 0, 0, 0};
    }
  }
};

// A = 64 of k of a warp's 16 rows, the dropped elements zeroed. `x`: the slab of its warpgroup. Of
// every word a lane has columns 2 (lane % 4) and the next in two of its rows: two bits of each of
// two bytes. A shift puts the first bit of both pairs into the signs of their bytes, another one
// the second bit, and prmt widens the signs.
__device__ __forceinline__ void load_dropped_rows(uint32_t (&a)[4][4], uint32_t x, uint4 low,
                                                  uint4 high, int warp, int lane) {
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    ldmatrix_x4(a[i], x + row * 128 + ((i * 2 + lane / 16) ^ (row & 7)) * 16);
  }
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int shift = 7 - lane % 4 * 2;
  const uint32_t first = warp % 2 == 0 ? 0xCC88 : 0xEEAA;  // signs of bytes 0, 4 or 2, 6
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t before = words[j] << shift, after = words[j] << (shift - 1);
    uint32_t kept[2];
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(kept[0]) : "r"(before), "r"(after), "r"(first));
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(kept[1]) : "r"(before), "r"(after), "r"(first + 0x1111));
    a[j / 2][j % 2 * 2] &= kept[0];
    a[j / 2][j % 2 * 2 + 1] &= kept[1];
  }
}

// ---- Of x^T as the left operand of `wgrad`: rows of the tile are columns of the mask ------------

// A lane's words of a slot (128 rows): of its warp's two word columns, unit rows 2 (lane % 4) and
// the next of every 32 rows.
struct ColumnWords {
  uint2 word[4][2];

  __device__ __forceinline__ void load(const LoraArgs& args, int row0, int column0, int warp,
                                       int lane) {
    const int64_t pitch = args.gemm.mask_pitch;
    const int column = min(static_cast<int>(pitch) - 2, column0 / 8 + warp * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = min(row0 / 4 + 8 * i + lane % 4 * 2 + j, args.dropout.unit_rows - 1);
        word[i][j] = __ldcg(reinterpret_cast<const uint2*>(args.gemm.mask + row * pitch + column));
      }
    }
  }
};

// A = v^T: 64 rows of a warp's 16 columns, the dropped elements zeroed. A lane has column lane / 4
// of both words, in rows s = 2 (lane % 4) and the next and every 8th from there: one bit of each
// byte of four words for 32 rows.
__device__ __forceinline__ void load_dropped_columns(uint32_t (&a)[4][4], uint32_t v,
                                                     const uint2 (&words)[2][2], int warp,
                                                     int lane) {
  // Of the four 8 x 8 matrices of a fragment: m + 8 from the third on, columns + 8 in the odd ones.
  const int row = lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
  const uint32_t from = v + row * 128 + (chunk ^ (row & 7)) * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(a[i], from + i * 16 * 128);
  const int shift = 7 - lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // 32 rows
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const uint32_t even = (column == 0 ? words[i][0].x : words[i][0].y) << shift;
      const uint32_t odd = (column == 0 ? words[i][1].x : words[i][1].y) << shift;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {  // rows 8 byte + s
        uint32_t kept;
        asm("prmt.b32 %0, %1, %2, %3;"
            : "=r"(kept)
            : "r"(even), "r"(odd), "r"(0xCC88 + byte * 0x1111));
        a[i * 2 + byte / 2][byte % 2 * 2 + column] &= kept;
      }
    }
  }
}

}  // namespace fastlora::sm90
