// g = s dY B and dB = dY^T h, dbias with it, from one read of dY: up to 16 ranks.
//
//   item     1024 rows of a cluster over a run of columns: 4 blocks of 128 rows a CTA
//   slot     128 rows x 128 columns of dY (two pieces of 64 columns), B of the columns, h of the
//            rows; a strip of 128 columns goes through all blocks of rows, then comes the next
//   group 0  multiplies by B: g of all rows of the item stays in registers until its end
//   group 1  multiplies by h, the tensor cores reading dY the other way: dB of a strip at a time
//
// Both leave parts of sums in memory and go on. A fence takes microseconds there, so that the warps
// beside the producer do the rest: one tells everybody what is written, the others add up parts, in
// the order of their columns (g) or rows (dB).
#pragma once

#include "lora/sm90_queue.cuh"
#include "lora/sm90_skinny.cuh"

namespace fastlora::sm90 {

constexpr int kBothRanks = 16;
constexpr int kBothBlocks = kBothRows / kUnitRows;  // of 128 rows, in each CTA
constexpr int kBothNarrow = 64 * kBothRanks * 2;    // bytes of B or h in a piece

// A part: of 16 rows of g or columns of dB every lane has 8 values, and with dbias 4 more.
template <bool kBias>
__device__ __forceinline__ float4* part_of(float4* parts, int slab, int runs, int run) {
  return parts + (int64_t{slab} * runs + run) * (kBias ? 3 : 2) * 32 + threadIdx.x % 32;
}
__device__ __forceinline__ void put(float4* at, const float* values) {
  __stcg(at, make_float4(values[0], values[1], values[2], values[3]));
}

__device__ __forceinline__ int both_blocks(const LoraArgs& args, int at) {
  return min(kBothBlocks, (args.gemm.m - at + kUnitRows - 1) / kUnitRows);
}

// ---- The producer -------------------------------------------------------------------------------

template <class Tile>
__device__ __forceinline__ void load_both(const LoraMaps& maps, const Ring<Tile>& ring, int row,
                                          int column) {
  const uint32_t full = ring.full(), slot = ring.x();
  mbarrier_arrive_expect(full, 2 * (kPieceBytes + 2 * kBothNarrow));
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    const uint32_t narrow = slot + kNarrowOffset + piece * kNarrowBytes;
    tma_load_2d(slot + piece * kPieceBytes, &maps.gemm.x, full, column + piece * 64, row);
    tma_load_2d(narrow, &maps.factor, full, 0, column + piece * 64);
    tma_load_2d(narrow + kBothNarrow, &maps.narrow[0], full, 0, row + piece * 64);
  }
}

template <class Tile, class Ahead>
__device__ __forceinline__ void produce_both(const LoraMaps& maps, const LoraArgs& args,
                                             Ring<Tile>& ring, const Item& item, int cta,
                                             Ahead& ahead) {
  int first;
  const int strips = slots_of(args.down, item.next, first), blocks = both_blocks(args, item.at);
  for (int i = 0; i < strips; ++i) {
    for (int block = 0; block < blocks; ++block) {
      ahead(i * blocks + block, strips * blocks);
      mbarrier_wait(ring.empty(), ring.phase ^ 1);
      load_both(maps, ring, item.at + block * kUnitRows + cta * 128, (first + i) * kSlotDepth);
      ring.advance();
    }
  }
}

// ---- The consumers ------------------------------------------------------------------------------

// Multiplies a slot: `multiply(wide, narrow)` starts it.
template <class Consumer, class Multiply>
__device__ __forceinline__ void slot_of_both(Consumer& consumer, Multiply multiply) {
  const uint32_t slot = consumer.ring.x();
  mbarrier_wait(consumer.ring.full(), consumer.ring.phase);
  wgmma_fence();
  multiply(slot, slot + kNarrowOffset);
  wgmma_commit();
  wgmma_wait<0>();
  consumer.release(consumer.ring.empty());
  consumer.ring.advance();
}

template <class T, class Consumer>
__device__ __forceinline__ void both_rows(const LoraArgs& args, const Item& item, int cta,
                                          Consumer& consumer) {
  const LoraDown& job = args.down;
  int first;
  const int strips = slots_of(job, item.next, first), blocks = both_blocks(args, item.at);
  float acc[kBothBlocks][2][kBothRanks / 2] = {};
#pragma unroll 1
  for (int i = 0; i < strips; ++i) {
#pragma unroll
    for (int block = 0; block < kBothBlocks; ++block) {
      if (block >= blocks) break;
      slot_of_both(consumer, [&](uint32_t wide, uint32_t narrow) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {  // 16 columns each
          const uint64_t b = descriptor_n_major<kBothRanks>(narrow + j / 4 * kNarrowBytes, 0) +
                             j % 4 * kNextK16NMajor<kBothRanks>;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t slab = wide + j / 4 * kPieceBytes + half * kSlabBytes;
            const uint64_t a = descriptor_k_major(slab) + j % 4 * kNextK16;
            Wgmma<kBothRanks>::template ss<T, 0, 1>(acc[block][half], a, b, true);
          }
        }
      });
    }
  }
#pragma unroll
  for (int block = 0; block < kBothBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&part)[kBothRanks / 2] = acc[block][half];
      pin(part);
      const int row = item.at + block * kUnitRows + cta * 128 + half * 64;
      float4* const to = part_of<false>(job.partial, row / 16 + consumer.warp, job.runs, item.next);
      put(to, part);
      put(to + 32, part + 4);
    }
  }
}

template <class T, bool kBias, class Consumer>
__device__ __forceinline__ void both_columns(const LoraArgs& args, const Item& item, int cta,
                                             uint32_t ones, Consumer& consumer) {
  const LoraWgrad& job = args.wgrad[0];
  int first;
  const int strips = slots_of(args.down, item.next, first), blocks = both_blocks(args, item.at);
#pragma unroll 1
  for (int i = first; i < first + strips; ++i) {
    float acc[2][kBothRanks / 2] = {}, bias[2][4] = {};
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      slot_of_both(consumer, [&](uint32_t wide, uint32_t narrow) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {  // 16 rows each
          const uint64_t b =
              descriptor_n_major<kBothRanks>(narrow + j / 4 * kNarrowBytes + kBothNarrow, 0) +
              j % 4 * kNextK16NMajor<kBothRanks>;
#pragma unroll
          for (int piece = 0; piece < 2; ++piece) {
            const uint32_t slab = wide + piece * kPieceBytes + j / 4 * kSlabBytes;
            const uint64_t a = descriptor_mn_major(slab, kSlabBytes) + j % 4 * kNextK16MnMajor;
            Wgmma<kBothRanks>::template ss<T, 1, 1>(acc[piece], a, b, true);
            if constexpr (kBias) {
              Wgmma<8>::template ss<T, 1, 0>(bias[piece], a, descriptor_constant(ones), true);
            }
          }
        }
      });
    }
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      pin(acc[piece]);
      pin(bias[piece]);
      const int slab = i * 8 + piece * 4 + consumer.warp;
      float4* const to = part_of<kBias>(job.partial, slab, job.runs, item.at / kBothRows * 2 + cta);
      put(to, acc[piece]);
      put(to + 32, acc[piece] + 4);
      if constexpr (kBias) put(to + 64, bias[piece]);
    }
  }
}

// `written`: shared address of a count of items for each consumer warp. One count of all would not
// do: a warp may be an item ahead of another.
template <class T, class Consumer>
__device__ __forceinline__ void both_item(const LoraArgs& args, const Item& item, int cta,
                                          uint32_t ones, uint32_t written, Consumer& consumer) {
  if (consumer.group == 0) {
    both_rows<T>(args, item, cta, consumer);
  } else if (args.wgrad[0].bias != nullptr) {
    both_columns<T, true>(args, item, cta, ones, consumer);
  } else {
    both_columns<T, false>(args, item, cta, ones, consumer);
  }
  __syncwarp();
  if (consumer.lane == 0) {
    add_release_shared(written + (consumer.group * 4 + consumer.warp) * 4);
  }
}

// ---- The warps beside the producer --------------------------------------------------------------

// By the first of them, which reads the queue as the consumers do.
__device__ __forceinline__ void tell_parts(const LoraArgs& args, ItemQueue queue, uint32_t written,
                                           int lane) {
  uint32_t* const counters = args.counters->flags + args.down.first_counter;
  uint32_t items = 0;
  while (true) {
    const Item item = queue.template next<true>();
    if (item.job == Job::kEnd) return;
    if (item.job != Job::kDown || !args.both) continue;
    ++items;
    if (lane < kConsumerWarps) wait_shared_at_least(written + lane * 4, items);
    __syncwarp();
    if (lane == 0) {
      add_release(counters + item.at / kBothRows);
      add_release(&args.counters->parts);
    }
  }
}

// The sum over all parts.
template <bool kBias, class Job>
__device__ __forceinline__ void sum_parts(float (&all)[kBias ? 12 : 8], const Job& job, int slab) {
#pragma unroll
  for (float& value : all) value = 0;
#pragma unroll 4
  for (int run = 0; run < job.runs; ++run) {
    const float4* const from = part_of<kBias>(job.partial, slab, job.runs, run);
#pragma unroll
    for (int i = 0; i < (kBias ? 3 : 2); ++i) {
      const float4 more = __ldcg(from + i * 32);
      all[4 * i] += more.x;
      all[4 * i + 1] += more.y;
      all[4 * i + 2] += more.z;
      all[4 * i + 3] += more.w;
    }
  }
}

template <bool kBias>
__device__ __forceinline__ void sum_columns(const LoraArgs& args, int slab, int lane) {
  float all[kBias ? 12 : 8];
  sum_parts<kBias>(all, args.wgrad[0], slab);
  store_columns<kBothRanks, kBias>(args, 0, all, slab * 16, 0, lane);
}

// By the others: 16 rows of g or columns of dB at a time, the first rows first.
template <class T>
__device__ __forceinline__ void sum_both(const LoraArgs& args, int lane) {
  LoraCounters& counters = *args.counters;
  const int rows = args.flags * 8, columns = args.wgrad[0].slots * 8;
  const int in_group = args.down.runs * 2;  // CTAs that have parts of the same rows
  while (true) {
    int slab = 0;
    if (lane == 0) slab = static_cast<int>(atomicAdd(&counters.sums, 1));
    slab = __shfl_sync(0xFFFFFFFF, slab, 0);
    if (slab >= rows + columns) return;
    if (slab < rows) {
      wait_at_least<200>(counters.flags + args.down.first_counter + slab / (kBothRows / 16),
                         in_group);
      float all[8];
      sum_parts<false>(all, args.down, slab);
      store_rows<T>(args, all, slab * 16, 0, scale_of(args.down), lane);
      announce(counters.flags + slab / 8, &counters.rows, lane);
    } else {
      wait_at_least<1000>(&counters.parts, args.down_items * 2);
      if (args.wgrad[0].bias != nullptr) {
        sum_columns<true>(args, slab - rows, lane);
      } else {
        sum_columns<false>(args, slab - rows, lane);
      }
    }
  }
}

}  // namespace fastlora::sm90
