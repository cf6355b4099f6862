// How a cluster gets its items: one thread of its first CTA claims them from counters in global
// memory (Claims), and hands each to the producer and the consumer warps of both CTAs through
// shared memory, one item ahead (ItemQueue).
#pragma once

#include "common/sm90/cluster.cuh"
#include "common/sm90/mbarrier.cuh"
#include "lora/sm90_shape.cuh"

namespace fastlora::sm90 {

constexpr int kQueueBytes = 128;

struct ItemQueue {
  uint32_t base;      // shared address: 2 items 16 bytes apart, their barriers
  uint32_t turn = 0;  // items read, or given, so far

  __device__ __forceinline__ uint32_t item() const { return base + turn % 2 * 16; }
  __device__ __forceinline__ uint32_t full() const { return base + 32 + turn % 2 * 8; }
  __device__ __forceinline__ uint32_t empty() const { return base + 48 + turn % 2 * 8; }
  __device__ __forceinline__ uint32_t phase() const { return turn / 2 % 2; }

  // `readers` in each CTA.
  __device__ __forceinline__ void init(int readers, int cluster) const {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(base + 32 + i * 8, 1);
      mbarrier_init(base + 48 + i * 8, readers * cluster);
    }
  }

  // By the thread that claims. The item travels like a load by TMA, and counts its bytes: an
  // arrival that releases to the cluster would wait for everything the thread has written.
  __device__ __forceinline__ void give(const Item& value, int cluster) {
    mbarrier_wait(empty(), phase() ^ 1);
    for (int cta = 0; cta < cluster; ++cta) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, "
          "%4}, "
          "[%5];" ::"r"(address_in(item(), cta)),
          "r"(static_cast<int>(value.job)), "r"(value.at), "r"(value.next),
          "r"(value.rank_block * 2 + value.product), "r"(address_in(full(), cta))
          : "memory");
    }
    ++turn;
  }

  // By every reader: the producer's thread, or all lanes of another warp.
  template <bool kWarp>
  __device__ __forceinline__ Item next() {
    if constexpr (!kWarp) mbarrier_arrive_expect(full(), 16);
    mbarrier_wait(full(), phase());
    int job, at, next, last;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(job), "=r"(at), "=r"(next), "=r"(last)
                 : "r"(item())
                 : "memory");
    if constexpr (kWarp) __syncwarp();
    // The address depends on what was read: the arrival must not overtake the read.
    if (!kWarp || threadIdx.x % 32 == 0) mbarrier_arrive_remote(empty() + (last >> 31), 0);
    ++turn;
    return {static_cast<Job>(job), at, next, last / 2, last % 2};
  }
};

// Claims of one cluster. They take a microsecond each, so that they come in two: what is started is
// finished later.
struct Claims {
  enum Kind { kEarly, kTiles, kLate, kNone };
  const LoraArgs& args;
  bool helper = false;
  Kind kind = kEarly;
  uint32_t claimed = 0;

  // The clusters that arrive first; never more than there are.
  __device__ __forceinline__ int helpers() const {
    return min(args.helpers, static_cast<int>(gridDim.x / 2));
  }

  // The number of an item of the current kind; where there are no more of it, -1, and the next kind
  // is current.
  __device__ __forceinline__ int number(int index) {
    const bool there = index < args.limits[kind];
    const int before =
        kind == kEarly ? 0 : args.limits[kEarly] + (kind == kTiles ? args.limits[kLate] : 0);
    if (!there) kind = static_cast<Kind>(kind + 1);
    return there ? before + index : -1;
  }

  // Of `arrival` clusters before this one. A cluster that is no helper brings a tile. Early items
  // are never anybody's before they are claimed: tiles wait for them, and clusters may be late.
  __device__ __forceinline__ int first(int arrival) {
    helper = arrival < helpers();
    if (!helper) {
      kind = kTiles;
      const int item = number(arrival - helpers());
      if (item >= 0) return item;
    }
    start();
    return finish();
  }

  // Nobody claims an early item after a tile: the tile in hand may be waiting for that very item.
  __device__ __forceinline__ void start() {
    if (kind != kNone) claimed = atomicAdd(&args.counters->next[kind], 1);
  }

  // The number of the next item, or -1 when there are no more.
  __device__ __forceinline__ int finish() {
    while (kind != kNone) {
      const int brought = kind == kTiles ? static_cast<int>(gridDim.x / 2) - helpers() : 0;
      const int item = number(brought + static_cast<int>(claimed));
      if (item >= 0) return item;
      start();
    }
    return -1;
  }
};

}  // namespace fastlora::sm90
