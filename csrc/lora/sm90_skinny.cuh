// The skinny products of the low-rank linear (sm90_kernel.cuh): who loads them, multiplies and
// sums.
//
//   down   h [128 rows, kN ranks] of a CTA over a run of k: 64 rows a warpgroup
//   wgrad  [128 columns, kN ranks] over a run of rows: 64 columns a warpgroup; v^T comes from
//          shared memory as it is, the tensor cores read it the other way (a masked v by registers)
//
// A slot of the ring holds two pieces, 64 deep, of the wide operand (128 x 64, 16 KiB each) and of
// the narrow one (64 x kN).
#pragma once

#include "common/sm90/narrow.cuh"
#include "common/sm90/store_as.cuh"
#include "gemm/sm90_consumer.cuh"
#include "gemm/sm90_producer.cuh"
#include "lora/sm90_shape.cuh"
#include "lora/sm90_sync.cuh"
#include "lora/sm90_words.cuh"

namespace fastlora::sm90 {

// ---- Flags and sums in global memory ------------------------------------------------------------

// Until the casts are done (RowsWait: and `down` has written rows [first, last)), for TMA loads
// that follow.
__device__ __forceinline__ void wait_casts(const LoraArgs& args) {
  if (args.cast_items == 0) return;
  wait_at_least(&args.counters->cast,
                args.cast_items * args.gemm.cluster_m * args.gemm.cluster_n * kConsumerWarps);
  fence_proxy_async_global();
}
struct RowsWait {
  const LoraArgs& args;
  bool all = false;  // rows are there

  __device__ __forceinline__ void operator()(int first, int last) {
    if (all) return;
    wait_casts(args);
    const auto warps = static_cast<uint32_t>(kConsumerWarps * args.rank_blocks);
    all = load_acquire(&args.counters->rows) == warps * args.flags;
    last = min(last, args.gemm.m);
    for (int row = first; row < last && !all; row += 128) {
      wait_at_least(args.counters->flags + row / 128, warps);
    }
    fence_proxy_async_global();
  }
};

// Adds a warp's part of a sum over several items to the others. True for the one that comes last:
// it then has the sum, added up in index order. `sum` numbers the sums of the job, each with room
// for kRoom values a lane.
template <int kRoom, int kValues>
__device__ __forceinline__ bool add_up(float (&acc)[kValues], float4* partial, int sum, int runs,
                                       int run, uint32_t* counters, int lane) {
  if (runs == 1) return true;
  static_assert(kValues <= kRoom);
  float4* const first = partial + int64_t{sum} * runs * (kRoom / 4) * 32 + lane;
#pragma unroll
  for (int i = 0; i < kValues / 4; ++i) {
    __stcg(first + (run * (kRoom / 4) + i) * 32,
           make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  __threadfence();
  __syncwarp();
  uint32_t before = 0;
  if (lane == 0) before = atomicAdd(counters + sum, 1);
  before = __shfl_sync(0xFFFFFFFF, before, 0);
  if (before != static_cast<uint32_t>(runs - 1)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kValues; ++i) acc[i] = 0;
#pragma unroll 1
  for (int other = 0; other < runs; ++other) {
#pragma unroll
    for (int i = 0; i < kValues / 4; ++i) {
      const float4 part = __ldcg(first + (other * (kRoom / 4) + i) * 32);
      acc[4 * i] += part.x;
      acc[4 * i + 1] += part.y;
      acc[4 * i + 2] += part.z;
      acc[4 * i + 3] += part.w;
    }
  }
  return true;
}

// ---- The producer -------------------------------------------------------------------------------

// A slot of `down` (k from `deep` on, rows from `at`) or of `wgrad` (rows from `deep`, columns from
// `at`), beside `narrow` ranks from `rank0`.
template <class Tile, int kN, bool kWgrad, bool kBackward>
__device__ __forceinline__ void load_skinny(const LoraMaps& maps, const Ring<Tile>& ring,
                                            int product, int deep, int at, int rank0) {
  const uint32_t full = ring.full(), slot = ring.x();
  mbarrier_arrive_expect(full, 2 * (kPieceBytes + 64 * kN * 2));
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    const int depth = deep + piece * 64;
    const uint32_t wide = slot + piece * kPieceBytes;
    const uint32_t narrow = slot + kNarrowOffset + piece * kNarrowBytes;
    if constexpr (kWgrad) {
      tma_load_2d(wide, &maps.wide[product], full, at, depth);
      tma_load_2d(wide + kSlabBytes, &maps.wide[product], full, at + 64, depth);
      tma_load_2d(narrow, &maps.narrow[product], full, rank0, depth);
    } else {
      tma_load_2d(wide, &maps.gemm.x, full, depth, at);
      if constexpr (kBackward) {
        tma_load_2d(narrow, &maps.factor, full, rank0, depth);
      } else {
        tma_load_2d(narrow, &maps.factor, full, depth, rank0);
      }
    }
  }
}

// ---- The consumers ------------------------------------------------------------------------------

// acc += the products of `slots` slots, with `multiply` starting those of one piece.
template <class Consumer, class Multiply>
__device__ __forceinline__ void sum_slots(Consumer& consumer, int slots, Multiply multiply) {
#pragma unroll 1
  for (int i = 0; i < slots; ++i) {
    const uint32_t slot = consumer.ring.x();
    mbarrier_wait(consumer.ring.full(), consumer.ring.phase);
    wgmma_fence();
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      multiply(slot + piece * kPieceBytes, slot + kNarrowOffset + piece * kNarrowBytes);
    }
    wgmma_commit();
    wgmma_wait<0>();  // it is short, and the slot is wanted
    consumer.release(consumer.ring.empty());
    consumer.ring.advance();
  }
}

// The same of a masked operand: it comes to registers, and `words` of a slot with it, which are
// fetched two slots ahead. `fetch(words, i)`, `load(a, words, piece, wide)`, `multiply(a, narrow)`.
template <class Words, class Consumer, class Fetch, class Load, class Multiply>
__device__ __forceinline__ void sum_masked_slots(Consumer& consumer, int slots, Fetch fetch,
                                                 Load load, Multiply multiply) {
  Words even, odd;
  fetch(even, 0);
  fetch(odd, min(1, slots - 1));
  const auto step = [&](Words& words, int i) {
    const uint32_t slot = consumer.ring.x();
    mbarrier_wait(consumer.ring.full(), consumer.ring.phase);
    uint32_t a[2][4][4];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      load(a[piece], words, piece, slot + piece * kPieceBytes + consumer.group * kSlabBytes);
    }
    fetch(words, min(i + 2, slots - 1));  // not past what was waited for
    wgmma_fence();
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      multiply(a[piece], slot + kNarrowOffset + piece * kNarrowBytes);
    }
    wgmma_commit();
    wgmma_wait<0>();
    consumer.release(consumer.ring.empty());
    consumer.ring.advance();
  };
#pragma unroll 1
  for (int i = 0; i < slots; i += 2) {
    step(even, i);
    if (i + 1 < slots) step(odd, i + 1);
  }
}

__device__ __forceinline__ float scale_of(const LoraDown& job) {
  return job.scaling == nullptr ? job.scale : job.scale * __ldg(job.scaling);
}

// A warp's 16 rows of h, from row0, and of its ranks those from rank0 on.
template <class T, int kValues>
__device__ __forceinline__ void store_rows(const LoraArgs& args, const float (&acc)[kValues],
                                           int row0, int rank0, float factor, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + half * 8 + lane / 4;
    if (row >= args.gemm.m) continue;
    T* const out = static_cast<T*>(args.down.out) + int64_t{row} * args.gemm.rank;
#pragma unroll
    for (int j = 0; j < kValues / 4; ++j) {
      const int rank = rank0 + lane % 4 * 2 + j * 8;
      if (rank >= args.gemm.rank) continue;
      *reinterpret_cast<uint32_t*>(out + rank) =
          pack<T>(acc[4 * j + 2 * half] * factor, acc[4 * j + 2 * half + 1] * factor);
    }
  }
}

// The same of a gradient's columns. With kBias the last 4 of `all` are the bias', of which the
// first and third are sums.
template <int kN, bool kBias, int kValues>
__device__ __forceinline__ void store_columns(const LoraArgs& args, int product,
                                              const float (&all)[kValues], int column0, int rank0,
                                              int lane) {
  const LoraWgrad& job = args.wgrad[product];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = column0 + half * 8 + lane / 4;
    if (column >= job.columns) continue;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const int rank = rank0 + lane % 4 * 2 + j * 8;
      if (rank >= args.gemm.rank) continue;
      const int64_t at = column * job.stride_column + rank * job.stride_rank;
      store_as(job.out, at, all[4 * j + 2 * half], job.type);
      store_as(job.out, at + job.stride_rank, all[4 * j + 2 * half + 1], job.type);
    }
    if constexpr (kBias) {
      if (lane % 4 == 0) {
        store_as(job.bias, column, all[kN / 2 + 2 * half], job.bias_type);
      }
    }
  }
}

template <class T, int kN, bool kBackward, bool kDrop, class Consumer>
__device__ __forceinline__ void down_item(const LoraArgs& args, const Item& item, int cta,
                                          Consumer& consumer) {
  const LoraDown& job = args.down;
  const int lane = consumer.lane, consumer_warp = consumer.group * 4 + consumer.warp;
  int first;
  const int slots = slots_of(job, item.next, first);
  float acc[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
  const int row0 = item.at + cta * 128;
  if constexpr (kDrop && !kBackward) {  // h = drop(x) A^T; g is of all of dY
    wait_words(args, row0, row0 + 128, lane);
    const int warp_row = row0 + consumer_warp * 16;
    sum_masked_slots<RowWords>(
        consumer, slots,
        [&](RowWords& words, int i) { words.load(args, warp_row, (first + i) * kSlotDepth, lane); },
        [&](uint32_t (&a)[4][4], const RowWords& words, int piece, uint32_t x) {
          load_dropped_rows(a, x, words.word[2 * piece], words.word[2 * piece + 1], consumer.warp,
                            lane);
        },
        [&](const uint32_t (&a)[4][4], uint32_t narrow) {
          const uint64_t b = descriptor_k_major(narrow);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Wgmma<kN>::template rs<T, 0>(acc, a[i], b + i * kNextK16, true);
          }
        });
  } else {
    sum_slots(consumer, slots, [&](uint32_t wide, uint32_t narrow) {
      const uint64_t a = descriptor_k_major(wide + consumer.group * kSlabBytes);
      const uint64_t b =
          kBackward ? descriptor_n_major<kN>(narrow, kNarrowBytes) : descriptor_k_major(narrow);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kN>::template ss<T, 0, kBackward>(
            acc, a + i * kNextK16, b + i * (kBackward ? kNextK16NMajor<kN> : kNextK16), true);
      }
    });
  }
  pin(acc);

  const int block = (item.at / kUnitRows * args.rank_blocks + item.rank_block) * 2 + cta;
  if (!add_up<kN / 2>(acc, job.partial, block * kConsumerWarps + consumer_warp, job.runs, item.next,
                      args.counters->flags + job.first_counter, lane)) {
    return;
  }
  store_rows<T>(args, acc, row0 + consumer_warp * 16, item.rank_block * kN, scale_of(job), lane);
  if (row0 < args.gemm.m) {
    announce(args.counters->flags + row0 / 128, &args.counters->rows, lane);
  }
}

// The bias' gradient, where asked for, is a product with ones beside the first block of ranks:
// 4 more values, of which the first and third are sums.
template <class T, int kN, bool kBias, bool kMasked, class Consumer>
__device__ __forceinline__ void wgrad_item(const LoraArgs& args, const Item& item, int cta,
                                           uint32_t ones, Consumer& consumer) {
  const LoraWgrad& job = args.wgrad[item.product];
  const int lane = consumer.lane, consumer_warp = consumer.group * 4 + consumer.warp;
  int first;
  const int slots = slots_of(job, item.next, first);
  constexpr int kValues = kN / 2 + (kBias ? 4 : 0);
  float acc[kN / 2], bias[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
  if constexpr (kMasked) {  // dA = g^T drop(x)
    const int column0 = item.at + cta * 128 + consumer.group * 64;
    wait_words(args, first * kSlotDepth, (first + slots) * kSlotDepth, lane);
    sum_masked_slots<ColumnWords>(
        consumer, slots,
        [&](ColumnWords& words, int i) {
          words.load(args, (first + i) * kSlotDepth, column0, consumer.warp, lane);
        },
        [&](uint32_t (&a)[4][4], const ColumnWords& words, int piece, uint32_t v) {
          const uint2 half[2][2] = {{words.word[2 * piece][0], words.word[2 * piece][1]},
                                    {words.word[2 * piece + 1][0], words.word[2 * piece + 1][1]}};
          load_dropped_columns(a, v, half, consumer.warp, lane);
        },
        [&](const uint32_t (&a)[4][4], uint32_t narrow) {
          const uint64_t b = descriptor_n_major<kN>(narrow, kNarrowBytes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Wgmma<kN>::template rs<T, 1>(acc, a[i], b + i * kNextK16NMajor<kN>, true);
          }
        });
  } else {
    sum_slots(consumer, slots, [&](uint32_t wide, uint32_t narrow) {
      const uint64_t a = descriptor_mn_major(wide + consumer.group * kSlabBytes, kSlabBytes);
      const uint64_t b = descriptor_n_major<kN>(narrow, kNarrowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kN>::template ss<T, 1, 1>(acc, a + i * kNextK16MnMajor, b + i * kNextK16NMajor<kN>,
                                        true);
        if constexpr (kBias) {
          Wgmma<8>::template ss<T, 1, 0>(bias, a + i * kNextK16MnMajor, descriptor_constant(ones),
                                         true);
        }
      }
    });
  }
  pin(acc);
  pin(bias);

  float all[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) all[i] = i < kN / 2 ? acc[i] : bias[i - kN / 2];
  const int block = (item.at / kUnitRows * args.rank_blocks + item.rank_block) * 2 + cta;
  const int sum = block * kConsumerWarps + consumer_warp;
  if (!add_up<kN / 2 + 4>(all, job.partial, sum, job.runs, item.next,
                          args.counters->flags + job.first_counter, lane)) {
    return;
  }
  store_columns<kN, kBias>(args, item.product, all, item.at + cta * 128 + consumer_warp * 16,
                           item.rank_block * kN, lane);
}

// A warp's share of a cast: 512 elements.
template <class T>
__device__ __forceinline__ void cast_item(const LoraArgs& args, int index, int cta,
                                          int consumer_warp, int lane) {
  const int in_first =
      static_cast<int>((args.casts[0].elements + kCastElements - 1) / kCastElements);
  const LoraCast& cast = args.casts[index < in_first ? 0 : 1];
  const int64_t begin = int64_t{index < in_first ? index : index - in_first} * kCastElements +
                        (cta * kConsumerWarps + consumer_warp) * 512 + lane * 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = begin + i * 256;
    if (at >= cast.elements) break;
    const float4 low = __ldg(reinterpret_cast<const float4*>(cast.from + at));
    const float4 high = __ldg(reinterpret_cast<const float4*>(cast.from + at + 4));
    reinterpret_cast<uint4*>(cast.to)[at / 8] = {pack<T>(low.x, low.y), pack<T>(low.z, low.w),
                                                 pack<T>(high.x, high.y), pack<T>(high.z, high.w)};
  }
  announce(&args.counters->cast, nullptr, lane);
}

}  // namespace fastlora::sm90
