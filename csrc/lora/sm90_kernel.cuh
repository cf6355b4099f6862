// A linear with everything low-rank around it on Hopper (lora.h): a persistent GEMM like that of
// gemm/sm90_kernel.cuh whose CTAs also make h (g) and the factors' gradients.
//
// What is skinny waits for memory, and one SM alone streams three times what it gets when all do:
// so a few clusters of CTAs make h while the others already multiply, and those few do a tile less.
// The order of the items is in sm90_shape.cuh, how clusters claim them in sm90_queue.cuh. Rows of h
// are announced by flags; a tile's producer waits for them before the last steps of its K loop,
// after everything else of it was loaded.
//
// Threads and the ring as in the GEMM; skinny items go through the same ring (sm90_skinny.cuh).
// With dropout the three warps beside the producer make the mask of x (sm90_words.cuh); it is
// applied to x on its way to h and dA, and to g A before dX is stored. Without it, backward and up
// to 16 ranks, they add up the parts of g and dB (sm90_both.cuh). Forward, y's columns may have
// factors as it is stored (DoRA). Takes: m >= 1; n, k and rank multiples of 8, rank up to 512 (64
// with dropout); kN, 16 or 64, ranks at a time. Shared memory: the GEMM's, the queue's 128 bytes
// with counts behind it, 512 bytes of ones.
#pragma once

#include "common/sm90/copy_async.cuh"
#include "gemm/sm90_kernel.cuh"
#include "lora/sm90_both.cuh"
#include "lora/sm90_queue.cuh"
#include "lora/sm90_skinny.cuh"

namespace fastlora::sm90 {

constexpr int kOnesBytes = 512;
constexpr int kWrittenOffset = 64;  // behind the queue: the counts of both_item
static_assert(kWrittenOffset + kConsumerWarps * 4 <= kQueueBytes);
// Whether g and dB may be made of one read. With dropout the warps that it takes make the mask.
template <int kN, bool kBackward, bool kDrop>
constexpr bool kMayBoth = kBackward && kN == kBothRanks && !kDrop;
// Of the queue, in each CTA: consumers, the producer, who tells what is written.
template <int kN, bool kBackward, bool kDrop>
constexpr int kReaders = kConsumerWarps + (kMayBoth<kN, kBackward, kDrop> ? 2 : 1);
template <bool kDrop>  // the mask's makers need more: 88 + 2 * 208 = 56 + 2 * 224 = 3 * 168
constexpr int kLoraProducerRegisters = kDrop ? 88 : 56;
template <bool kDrop>
constexpr int kLoraConsumerRegisters = kDrop ? 208 : 224;
template <class Tile>
constexpr int kLoraSharedBytes = Tile::kSharedBytes + kQueueBytes + kOnesBytes;

// Claims items and hands them to both CTAs: one ahead, in the middle of the item in hand.
template <class Tile>
struct Giver {
  const LoraArgs& args;
  ItemQueue queue;
  Claims claims;

  __device__ __forceinline__ void give(int item) {
    queue.give(decode<Tile>(args, item), args.gemm.cluster_m * args.gemm.cluster_n);
  }
  // At every step of an item: the claim comes back while steps are loaded.
  __device__ __forceinline__ void operator()(int step, int steps) {
    if (step == steps / 2) claims.start();
    if (step == min(steps / 2 + 4, steps - 1)) give(claims.finish());
  }
};

// Loads items until there are no more. `ahead` sees to the next ones.
template <class Tile, int kN, bool kBackward, bool kDrop, class Ahead>
__device__ __forceinline__ void produce_claimed(const LoraMaps& maps, const LoraArgs& args,
                                                uint32_t base, uint32_t queue, int cta,
                                                Ahead& ahead) {
  Ring<Tile> ring{base};
  RowsWait wait_rows{args};
  ItemQueue readers{queue};
  while (true) {
    const Item item = readers.template next<false>();
    if (item.job == Job::kEnd) return;
    if (item.job == Job::kTile) {
      int row = item.at, col = item.next;
      shift_tile<Tile>(args.gemm, cta, row, col);
      produce_tile<Tile, kBackward, false, kN>(maps.gemm, args.gemm, ring, cta, row, col, ahead,
                                               [&] { wait_rows(row, row + Tile::kM); });
      continue;
    }
    if (item.job == Job::kCast) {
      ahead(0, 1);
      continue;
    }
    const bool down = !kBackward || item.job == Job::kDown;
    if (down) wait_casts(args);
    if constexpr (kMayBoth<kN, kBackward, kDrop>) {
      if (down && args.both) {
        produce_both(maps, args, ring, item, cta, ahead);
        continue;
      }
    }
    int first;
    const int slots = down ? slots_of(args.down, item.next, first)
                           : slots_of(args.wgrad[item.product], item.next, first);
    if (!down && item.product == 1) wait_rows(first * kSlotDepth, (first + slots) * kSlotDepth);
    const int at = item.at + cta * 128, rank0 = item.rank_block * kN;
    for (int i = 0; i < slots; ++i) {
      ahead(i, slots);
      mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (down) {
        load_skinny<Tile, kN, false, kBackward>(maps, ring, 0, (first + i) * kSlotDepth, at, rank0);
      } else {
        load_skinny<Tile, kN, true, kBackward>(maps, ring, item.product, (first + i) * kSlotDepth,
                                               at, rank0);
      }
      ring.advance();
    }
  }
}

// `arrival`: clusters that arrived before, for CTA 0.
template <class Tile, int kN, bool kBackward, bool kDrop>
__device__ __forceinline__ void produce_items(const LoraMaps& maps, const LoraArgs& args,
                                              uint32_t base, uint32_t queue, int cta, int arrival) {
  if (cta == 0) {
    Giver<Tile> giver{args, {queue}, {args}};
    giver.give(giver.claims.first(arrival));
    produce_claimed<Tile, kN, kBackward, kDrop>(maps, args, base, queue, cta, giver);
  } else {
    const auto nothing = [](int, int) {};
    produce_claimed<Tile, kN, kBackward, kDrop>(maps, args, base, queue, cta, nothing);
  }
}

template <class T, int kN, bool kBackward, bool kDrop, class Consumer>
__device__ __forceinline__ void consume_skinny(const LoraArgs& args, const Item& item, int cta,
                                               uint32_t ones, uint32_t written,
                                               Consumer& consumer) {
  if (item.job == Job::kCast) {
    cast_item<T>(args, item.at, cta, consumer.group * 4 + consumer.warp, consumer.lane);
    return;
  }
  if (item.job == Job::kDown) {
    if constexpr (kMayBoth<kN, kBackward, kDrop>) {
      if (args.both) {
        both_item<T>(args, item, cta, ones, written, consumer);
        return;
      }
    }
    down_item<T, kN, kBackward, kDrop>(args, item, cta, consumer);
    return;
  }
  if constexpr (kBackward) {
    if (args.wgrad[item.product].bias != nullptr && item.rank_block == 0) {
      wgrad_item<T, kN, true, false>(args, item, cta, ones, consumer);
    } else if (kDrop && item.product == 1) {
      wgrad_item<T, kN, false, kDrop>(args, item, cta, ones, consumer);
    } else {
      wgrad_item<T, kN, false, false>(args, item, cta, ones, consumer);
    }
  }
}

template <class T, class Tile, int kN, bool kBackward, bool kDrop>
__device__ __forceinline__ void consume_items(const LoraMaps& maps, const LoraArgs& args,
                                              uint32_t base, uint32_t queue_base, uint32_t ones,
                                              int cta, int consumer_warp, int lane) {
  Consumer<T, Tile, kBackward, false, kN> consumer(maps.gemm, args.gemm, base, consumer_warp, lane);
  ItemQueue queue{queue_base};
  [[maybe_unused]] bool words_made = false;  // all of the mask
  Item item = queue.template next<true>();
  while (item.job != Job::kEnd) {
    if (item.job != Job::kTile) {
      consume_skinny<T, kN, kBackward, kDrop>(args, item, cta, ones, queue_base + kWrittenOffset,
                                              consumer);
      item = queue.template next<true>();
      continue;
    }
    if constexpr (kDrop) consumer.forget();
    int row = item.at, col = item.next;
    shift_tile<Tile>(args.gemm, cta, row, col);
    row += consumer.part_row();
    col += consumer.part_col();
    uint32_t bias[Tile::kGroupN / 8] = {};  // dX has none
    if constexpr (!kBackward) {
      if (args.columns == nullptr) load_bias(bias, args.gemm, col + lane % 4 * 2);
    }
    if constexpr (kDrop && kBackward) {
      MaskBits<Tile> mask;
      const int mask_row = row + consumer.warp * 16 + lane / 4;
      words_made = words_made || all_words_are_there(args, consumer.group);
      const bool loaded = words_made && consumer.base_steps_with(mask, mask_row, col);
      if (!words_made) consumer.base_steps(false);
      consumer.finish();
      if (!loaded) {
        wait_words(args, row, row + 1, lane);
        mask.load(args.gemm, mask_row, col, lane);
      }
      item = queue.template next<true>();
      mbarrier_wait(consumer.ring.full(), consumer.ring.phase);
      consumer.store(bias, row, col, [&](int j, int slab_column, float (&low)[32]) {
        consumer.masked_rank(low, mask, j, slab_column);
      });
      consumer.ring.advance();
      consumer.release(consumer.ring.previous_empty());
    } else {
      consumer.base_steps(false);
      consumer.rank_steps(true);
      consumer.finish();
      item = queue.template next<true>();  // nothing waits for it while the tile is stored
      if constexpr (!kBackward && !kDrop) {
        if (args.columns != nullptr) {
          consumer.store_scaled(args.columns, args.keeps_z ? &maps.z : nullptr, row, col);
          continue;
        }
      }
      consumer.store(bias, row, col);
    }
  }
  if (lane == 0) tma_wait<0>();
}

// The counters of launches before this one, by the three warps beside every producer.
__device__ __forceinline__ void zero_used(const LoraArgs& args, int warp, int lane) {
  for (int64_t i = (int64_t{blockIdx.x} * 3 + warp) * 32 + lane; i < args.used_count;
       i += int64_t{gridDim.x} * 3 * 32) {
    args.used[i] = 0;
  }
}

template <class T, class Tile, int kN, bool kBackward, bool kDrop>
__global__ void __launch_bounds__(kThreads, 1)
    lora_kernel(const __grid_constant__ LoraMaps maps, const __grid_constant__ LoraArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const uint32_t queue = base + Tile::kSharedBytes, ones = queue + kQueueBytes;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int cluster = args.gemm.cluster_m * args.gemm.cluster_n;
  const int cta = cluster_rank();
  if (kBackward && threadIdx.x < kOnesBytes / 4) {
    store_shared(ones + threadIdx.x * 4, pack<T>(1.f, 1.f));
    fence_proxy_async();
  }
  int arrival = 0;  // on its way while everything is prepared
  if (threadIdx.x == 0 && cta == 0) {
    arrival = static_cast<int>(atomicAdd(&args.counters->arrived, 1));
  }
  start_ring<Tile>(base, cluster, maps.gemm, [&] {
    ItemQueue{queue}.init(kReaders<kN, kBackward, kDrop>, cluster);
    for (int i = 0; i < kConsumerWarps; ++i) store_shared(queue + kWrittenOffset + i * 4, 0);
  });

  if (warp < 4) {
    registers_decrease<kLoraProducerRegisters<kDrop>>();
    if (warp > 0) zero_used(args, warp - 1, lane);
    if (warp == 0 && lane == 0) {
      produce_items<Tile, kN, kBackward, kDrop>(maps, args, base, queue, cta, arrival);
    } else if (kMayBoth<kN, kBackward, kDrop> && warp == 1) {
      tell_parts(args, ItemQueue{queue}, queue + kWrittenOffset, lane);
    } else if (warp > 0) {
      if constexpr (kDrop) make_words(args, lane);
      if constexpr (kMayBoth<kN, kBackward, kDrop>) {
        if (args.both) sum_both<T>(args, lane);
      }
    }
  } else {
    registers_increase<kLoraConsumerRegisters<kDrop>>();
    consume_items<T, Tile, kN, kBackward, kDrop>(maps, args, base, queue, ones, cta, warp - 4,
                                                 lane);
  }
  end_together(cluster);
}

}  // namespace fastlora::sm90
