// y = x W^T + bias + h B^T of few rows, W [n, k] in 4 bits, read as it lies.
//
//   CTA      as many groups of 16 features (rows of W) as give every SM one CTA, all of k, up to 16
//            rows of x. Every warp has a part of k: some blocks of 64 of x are in registers while
//            it goes through the features; at last the warps' sums are added up
//   product  mma.sync m16n8k16: 16 features by 8 rows of x. The tensor cores do not mind the order
//            of k: of the 64 elements of a block a lane takes 16 that are neighbours, which are 8
//            bytes of codes and 32 of x
//   codes    a byte is two elements: a table of all 256 pairs, for every lane in a bank of its own,
//            turns it into a register of an operand
//   scales   are made ahead, of many features at once; they multiply the sums of a block, in fp32:
//            elements are code values, rounded to x's type
//   h        is there, or a kernel in front makes it, for which only the last step waits
//
// What limits it is shared memory: of 16 features x 64 k a warp reads 512 bytes of codes and 2 KiB
// of the table. Takes whole blocks of 64 elements or more in a row.
//
// Shared memory: the table; a ring of stages of codes for every warp, filled by cp.async; the
// warps' sums; the values of quantised scales; scales.
#pragma once

#include "common/index.cuh"
#include "common/sm80/mma.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/pdl.cuh"
#include "nf4/decode.cuh"
#include "nf4/linear.h"
#include "nf4/sm80_ranks.cuh"

namespace fastlora {

constexpr int kFewGroup = 16;  // features

template <int kWarpsOf, int kRowsOf, int kShiftOf, int kStagesOf>
struct FewTile {
  static constexpr int kWarps = kWarpsOf, kRows = kRowsOf, kShift = kShiftOf, kStages = kStagesOf;
  static constexpr int kThreads = kWarps * 32, kTiles = kRows / 8;
  static constexpr int kMostSums = (kRows == 8 ? 2 : 4) * 16 * kFewGroup;  // of a warp
  static constexpr int kBlocks = kRows == 8 ? 4 : 2;  // of 64 k in a stage, of 16 features
  static constexpr int kCodeRow = kBlocks * kNf4BlockK / 2, kStageBytes = kFewGroup * kCodeRow;
  static constexpr int kTableBytes = 256 << kShift;
  static constexpr int kSums = kTableBytes + kWarps * kStages * kStageBytes;
  static constexpr int kNested = kSums + kWarps * kMostSums * 4;
  static constexpr int kScales = kNested + 256 * 4;
};

// Scales of a feature, apart from the next one's so that features are in banks of their own.
__host__ __device__ constexpr int few_scale_pitch(int blocks) { return blocks | 1; }

// The groups of 16 features that a CTA has, in passes, and the part of k that a warp has.
struct FewShare {
  int feature, groups, pass_groups;
  int begin, end;  // blocks of 64 k

  __device__ __forceinline__ int of_pass(int done) const { return min(pass_groups, groups - done); }
};

// Tells the compiler to keep a value in a register, which it would rather make again in every step.
template <class Value>
__device__ __forceinline__ Value kept(Value value) {
  static_assert(sizeof(Value) == 4);
  asm volatile("" : "+r"(value));
  return value;
}

// What a warp copies next: passes, of them blocks of k, of them groups.
template <class Tile>
struct FewLoader {
  static constexpr int kChunks = Tile::kBlocks * 2, kRowsAtOnce = 32 / kChunks;

  const Nf4Linear& p;
  const FewShare& share;
  const int row, chunk;            // of a group, that the lane copies first
  const int at;                    // where in a stage
  const int64_t some_rows;         // bytes of as many rows of W as are copied at once
  int done = 0, group = 0, block;  // groups of earlier passes; in this pass
  int rows;                        // of W from the group on
  const uint8_t* codes;            // the lane's

  // Chunks of 16 bytes change places by the row, so that those that are read at once, by half a
  // warp, are in banks of their own.
  __device__ __forceinline__ static int swizzle(int row) {
    return Tile::kBlocks == 4 ? row % 4 * 2 : row & 2;
  }

  __device__ __forceinline__ FewLoader(const Nf4Linear& p, const FewShare& share, int lane)
      : p(p),
        share(share),
        row(lane / kChunks),
        chunk(lane % kChunks),
        at(kept(row * Tile::kCodeRow + (chunk ^ swizzle(row)) * 16)),
        some_rows(p.k / 2 * kRowsAtOnce),
        block(share.begin) {
    static_assert(kRowsAtOnce % 4 == 0);          // they share a swizzle
    if (block >= share.end) done = share.groups;  // nothing
    seek();
  }
  __device__ __forceinline__ void seek() {
    const int feature = share.feature + done * kFewGroup;
    rows = static_cast<int>(p.n) - feature;
    codes = p.codes + (feature + row) * (p.k / 2) + block * 32 + chunk * 16;
  }
  // What is past the weight's features stays as it is: it meets no other feature. (Codes are read
  // once where x is one tile of rows, as on Hopper.)
  __device__ __forceinline__ void copy(uint32_t to) {
    if (done < share.groups) {
#pragma unroll
      for (int i = 0; i < kFewGroup / kRowsAtOnce; ++i) {
        if (row + i * kRowsAtOnce < rows && block + chunk / 2 < share.end) {
          sm90::copy_async_16_once(to + at + i * kRowsAtOnce * Tile::kCodeRow, codes);
        }
        codes += some_rows;
      }
      rows -= kFewGroup;
      if (++group == share.of_pass(done)) {
        group = 0;
        block += Tile::kBlocks;
        if (block >= share.end) {
          block = share.begin;
          done += share.pass_groups;
        }
        seek();
      }
    }
    sm90::copy_async_commit();
  }
};

// The line of an address that is before `end`, into L2.
__device__ __forceinline__ void prefetch_l2(const void* address, const void* end) {
  if (address < end) asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ void prefetch_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}

// Scales of features that follow each other, in fp32: the first words of four on their way while
// the CTA sets up, then made.
template <class Tile, bool kNested>
struct FewScales {
  static constexpr int kAhead = 2;
  const Nf4Scales& scales;
  const int blocks;  // of a feature
  const int first, count;
  const bool by_four;
  uint32_t codes[kAhead] = {};
  float absmax[kAhead] = {};

  __device__ __forceinline__ FewScales(const Nf4Scales& scales, int blocks, int first, int count)
      : scales(scales),
        blocks(blocks),
        first(first),
        count(count),
        by_four(kNested && blocks % 4 == 0 && scales.nested_shift >= 2 &&
                reinterpret_cast<uintptr_t>(scales.codes) % 4 == 0) {
    if (!by_four) return;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int word = i * Tile::kThreads + static_cast<int>(threadIdx.x);
      if (word < count / 4) load_four(word, codes[i], absmax[i]);
    }
  }

  __device__ __forceinline__ void load_four(int word, uint32_t& code, float& wide) const {
    const int at = first + word * 4;
    code = __ldg(reinterpret_cast<const uint32_t*>(scales.codes + at));
    wide = __ldg(scales.nested_absmax + (at >> scales.nested_shift));
  }
  __device__ __forceinline__ void make_four(float* to, int word, uint32_t code, float wide,
                                            const float* nested_code, float offset) const {
    const int row = word * 4 / blocks;
    to += row * few_scale_pitch(blocks) + word * 4 - row * blocks;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[e] = make_scale({wide, code >> 8 * e & 0xFF}, true, nested_code, offset);
    }
  }
  __device__ __forceinline__ void make(float* to, const float* nested_code, float offset) const {
    const int thread = static_cast<int>(threadIdx.x), words = count / 4;
    if (by_four) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int word = i * Tile::kThreads + thread;
        if (word < words) make_four(to, word, codes[i], absmax[i], nested_code, offset);
      }
#pragma unroll 1
      for (int word = kAhead * Tile::kThreads + thread; word < words; word += Tile::kThreads) {
        uint32_t code;
        float wide;
        load_four(word, code, wide);
        make_four(to, word, code, wide, nested_code, offset);
      }
      return;
    }
#pragma unroll 4
    for (int i = thread; i < count; i += Tile::kThreads) {
      const int row = i / blocks;
      to[row * few_scale_pitch(blocks) + i - row * blocks] =
          make_scale(load_scale(scales, first + i), kNested, nested_code, offset);
    }
  }
};

// 8 rows of x and the blocks of a stage, as a lane multiplies them; past the warp's part of k they
// are zero.
template <class T, class Tile>
__device__ __forceinline__ void load_few_rows(uint32_t (&out)[Tile::kBlocks][Tile::kTiles][8],
                                              const Nf4Linear& p, int first_row, int block, int end,
                                              int lane) {
#pragma unroll
  for (int i = 0; i < Tile::kBlocks; ++i) {
#pragma unroll
    for (int t = 0; t < Tile::kTiles; ++t) {
      const int64_t row = min(int64_t{first_row + t * 8 + lane / 4}, p.m - 1);
      if (block + i < end) {
        load_pairs<T>(out[i][t], static_cast<const T*>(p.x) + row * p.x_pitch +
                                     (block + i) * kNf4BlockK + lane % 4 * 16);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) out[i][t][e] = 0;
      }
    }
  }
}

// Sums: [warp][tile of 8 rows, or of `rows` where there are fewer][feature][row]; rows change
// places by the feature.
__device__ __forceinline__ int few_sum(int feature, int row, int rows) {
  return rows == 8 ? feature * 8 + (row ^ (feature >> 1 & 6)) : feature * rows + row;
}
// Of m rows so many of a tile are kept.
__host__ __device__ constexpr int few_rows_kept(int64_t m) { return m <= 2 ? 2 : m <= 4 ? 4 : 8; }

// `held`: of how many groups scales are made at once; all, or as many as some passes have.
template <class T, class Tile, bool kNested>
__global__ void __launch_bounds__(Tile::kThreads)
    few_kernel(const __grid_constant__ Nf4Linear p, const __grid_constant__ CodeBook book,
               int groups, int pass_groups, int held) {
  constexpr int kRows = Tile::kRows, kTiles = Tile::kTiles, kBlocks = Tile::kBlocks;
  constexpr int kStages = Tile::kStages, kThreads = Tile::kThreads;
  constexpr bool kHeldX = kTiles == 1;  // x of the first k is loaded ahead
  static_assert(kThreads >= 256);       // as many as quantised scales have values
  extern __shared__ __align__(128) char shared[];
  auto* const nested_code = reinterpret_cast<float*>(shared + Tile::kNested);
  auto* const scales = reinterpret_cast<float*>(shared + Tile::kScales);
  const int warp = kept(static_cast<int>(threadIdx.x / 32));
  const int lane = kept(static_cast<int>(threadIdx.x % 32));
  const int g = lane / 4, q = lane % 4;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int blocks = static_cast<int>(p.k / kNf4BlockK), each = ceil_div(blocks, Tile::kWarps);
  const int first_group = static_cast<int>(blockIdx.x) * groups;
  const FewShare share{first_group * kFewGroup,
                       min(groups, static_cast<int>(ceil_div(p.n, kFewGroup)) - first_group),
                       pass_groups, min(warp * each, blocks), min((warp + 1) * each, blocks)};
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int ring = Tile::kTableBytes + warp * kStages * Tile::kStageBytes;
  FewLoader<Tile> loader(p, share, lane);
  // What is small and needed first is asked for first: codes keep memory busy for microseconds.
  const int scale_blocks = static_cast<int>(p.k >> p.block_shift);
  const int scale_pitch = few_scale_pitch(scale_blocks), block_shift = p.block_shift - 6;
  const auto scales_from = [&](int done) {  // of the groups from there on that are held
    const int feature = share.feature + done * kFewGroup;
    const int features =
        min(min(held, share.groups - done) * kFewGroup, static_cast<int>(p.n) - feature);
    return FewScales<Tile, kNested>(p.scales, scale_blocks, feature * scale_blocks,
                                    features * scale_blocks);
  };
  const FewScales<Tile, kNested> first_scales = scales_from(0);
  const float offset = kNested ? *p.scales.offset : 0.0f;
  const bool fetches = kNested && threadIdx.x < 256;
  const float value = fetches ? __ldg(p.scales.nested_code + threadIdx.x) : 0.0f;
  uint32_t x[kBlocks][kTiles][8];
  if constexpr (kHeldX) load_few_rows<T, Tile>(x, p, first_row, share.begin, share.end, lane);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) loader.copy(base + ring + i * Tile::kStageBytes);
  fill_table<T, Tile::kShift>(shared, book.value, threadIdx.x, kThreads);
  if (fetches) nested_code[threadIdx.x] = value;
  // B's rows are needed at the end.
  const int64_t b_bytes = int64_t{groups} * kFewGroup * p.rank * (p.b_float ? 4 : 2);
  for (int64_t i = threadIdx.x * 128; i < b_bytes; i += kThreads * 128) {
    prefetch_l2(static_cast<const char*>(p.b) + blockIdx.x * b_bytes + i,
                static_cast<const char*>(p.b) + p.n * p.rank * (p.b_float ? 4 : 2));
  }
  __syncthreads();
  first_scales.make(scales, nested_code, offset);
  __syncthreads();

  // Where things are: the stage that is multiplied and the one that is filled; what a lane reads.
  const auto next_stage = [&](int at) {
    return at == ring + (kStages - 1) * Tile::kStageBytes ? ring : at + Tile::kStageBytes;
  };
  int stage = ring, filled = ring + (kStages - 1) * Tile::kStageBytes;
  int own_code[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    own_code[i] = kept(g * Tile::kCodeRow + ((2 * i + q / 2) ^ loader.swizzle(g)) * 16 + q % 2 * 8);
  }
  const uint32_t entry = kept(lane * 4u);
  auto* const sums = reinterpret_cast<float*>(shared + Tile::kSums);
  const int rows_kept = few_rows_kept(p.m), tile_sums = pass_groups * kFewGroup * rows_kept;
  float* const own_sums = sums + warp * kTiles * tile_sums;
  const int own_sum[2] = {kept(few_sum(g, q * 2, rows_kept)),
                          kept(few_sum(g + 8, q * 2, rows_kept))};
  const bool keeps = q * 2 < rows_kept;
  const int rank = static_cast<int>(p.rank), parts = ceil_div(blocks, each);
#pragma unroll 1
  for (int done = 0; done < share.groups; done += pass_groups) {
    const int now = share.of_pass(done), first_feature = share.feature + done * kFewGroup;
    if (done > 0 && done % held == 0) {
      scales_from(done).make(scales, nested_code, offset);
      __syncthreads();
    }
    const float* const own_scales = scales + (done % held * kFewGroup + g) * scale_pitch;
#pragma unroll 1
    for (int block = share.begin; block < share.end; block += kBlocks) {
      if (!kHeldX || block > share.begin || done > 0) {
        load_few_rows<T, Tile>(x, p, first_row, block, share.end, lane);
      }
      if (block + kBlocks + q < share.end && q < kBlocks) {  // x of the next blocks, a line a lane
        const int64_t row = min(int64_t{first_row + g}, p.m - 1);
        prefetch_l1(static_cast<const T*>(p.x) + row * p.x_pitch +
                    (block + kBlocks + q) * kNf4BlockK);
      }
      float* to = own_sums;
      int own_by[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        own_by[i] = min(block + i, share.end - 1) >> block_shift;
      }
      const float* by_from = own_scales;
#pragma unroll 1
      for (int group = 0; group < now; ++group) {
        sm90::copy_async_wait<kStages - 2>();
        __syncwarp();  // all lanes' copies of this stage are there, and all have read the last one
        loader.copy(base + filled);
        filled = next_stage(filled);
        uint2 words[kBlocks][2];
        float by[kBlocks][2];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            words[i][f] = *reinterpret_cast<const uint2*>(shared + stage + own_code[i] +
                                                          f * 8 * Tile::kCodeRow);
            by[i][f] = by_from[own_by[i] + f * 8 * scale_pitch];
          }
        }
        stage = next_stage(stage);
        by_from += kFewGroup * scale_pitch;
        float2 all[kTiles][2] = {};  // of the first k there is nothing yet
        if (block > share.begin && keeps) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int f = 0; f < 2; ++f) {
              all[t][f] = *reinterpret_cast<const float2*>(to + t * tile_sums + own_sum[f]);
            }
          }
        }
#pragma unroll
        for (int pair = 0; pair < kBlocks; pair += 2) {  // two chains of products
          float acc[2][kTiles][4] = {};
#pragma unroll
          for (int s = 0; s < 4; ++s) {  // 16 elements
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint32_t w[4];
#pragma unroll
              for (int f = 0; f < 2; ++f) {
                const uint2 both = words[pair + i][f];
                const uint32_t word = s < 2 ? both.x : both.y;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  w[e * 2 + f] = table_entry<Tile::kShift>(shared, word, s % 2 * 2 + e, entry);
                }
              }
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                multiply<T>(acc[i][t], w, x[pair + i][t][2 * s], x[pair + i][t][2 * s + 1]);
              }
            }
          }
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int f = 0; f < 2; ++f) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                all[t][f].x += by[pair + i][f] * acc[i][t][2 * f];
                all[t][f].y += by[pair + i][f] * acc[i][t][2 * f + 1];
              }
            }
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            if (keeps) *reinterpret_cast<float2*>(to + t * tile_sums + own_sum[f]) = all[t][f];
          }
        }
        to += kFewGroup * rows_kept;
      }
    }

    // A thread has a feature, of every so manieth row: its first ranks of B stay in registers.
    const int features = now * kFewGroup, rows_at_once = kThreads / features;
    const int own_feature = static_cast<int>(threadIdx.x) % features;
    const int own_row = static_cast<int>(threadIdx.x) / features;
    const int64_t column = int64_t{first_feature} + own_feature;
    const bool busy = own_row < rows_at_once && column < p.n;
    float b[kMostNf4Ranks] = {}, bias = 0;
    const auto load_b = [&](int from) {
#pragma unroll
      for (int r = 0; r < kMostNf4Ranks; ++r) {
        const int64_t which = column * rank + from + r;
        b[r] = !busy || from + r >= rank ? 0.0f
               : p.b_float ? wide(static_cast<T>(static_cast<const float*>(p.b)[which]))
                           : wide(static_cast<const T*>(p.b)[which]);
      }
    };
    load_b(0);
    if (busy && p.bias != nullptr) bias = wide(static_cast<const T*>(p.bias)[column]);
#if __CUDA_ARCH__ >= 900
    if (rank > 0) sm90::pdl_wait();
#endif
    const auto update = [&](int row) {
      const T* const h = static_cast<const T*>(p.h) + int64_t{first_row + row} * rank;
      float sum = 0;
#pragma unroll 1
      for (int from = 0; from < rank; from += kMostNf4Ranks) {
        if (rank > kMostNf4Ranks) load_b(from);
#pragma unroll
        for (int r = 0; r < kMostNf4Ranks; ++r) {
          if (from + r < rank) sum += wide(h[from + r]) * b[r];
        }
      }
      return sum;
    };
    // The first row's before the sums are waited for.
    float y = bias;
    if (busy && first_row + own_row < p.m && own_row < kRows) y += update(own_row);
    __syncthreads();
#pragma unroll 1
    for (int i = own_row; i < kRows && busy && first_row + i < p.m; i += rows_at_once) {
      const float* const of = sums + i / 8 * tile_sums + few_sum(own_feature, i % 8, rows_kept);
      if (i > own_row) y = bias + update(i);
#pragma unroll 4
      for (int w = 0; w < parts; ++w) y += of[w * kTiles * tile_sums];
      static_cast<T*>(p.y)[(first_row + i) * p.n + column] = static_cast<T>(y);
    }
    if (done + pass_groups < share.groups) __syncthreads();  // sums are read
  }
}

}  // namespace fastlora
