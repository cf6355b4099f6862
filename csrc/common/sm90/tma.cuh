// TMA: asynchronous copies of boxes of a tensor between global and shared memory. One thread issues
// each. Boxes that reach outside the tensor are filled with zeros on loads (which count all their
// bytes at the mbarrier) and clipped on stores.
//
// Coordinates are in elements, innermost dimension first. Shared addresses are 32-bit; with the
// 128-byte swizzle a box starts at a multiple of 1024.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastlora::sm90 {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// There are no forms with an L2 cache policy: with any policy the SMs that ask for the same box at
// the same time are no longer served together, which doubled L2 traffic (benchmarks/NOTES.md).

// ---- Loads into this CTA ----------------------------------------------------------------------

#define FASTLORA_TMA_LOAD(dims) \
  "cp.async.bulk.tensor." dims ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"

__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, int x, int y) {
  asm volatile(FASTLORA_TMA_LOAD("2d") " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared), "l"(map),
               "r"(barrier), "r"(x), "r"(y)
               : "memory");
}

// ---- Loads into several CTAs of the cluster ---------------------------------------------------
//
// The box lands at the same shared address of every CTA whose bit is set in `ctas`, and counts at
// the barrier of the same address there.

__device__ __forceinline__ void tma_load_2d_multicast(uint32_t shared, const CUtensorMap* map,
                                                      uint32_t barrier, int x, int y,
                                                      uint16_t ctas) {
  asm volatile(
      FASTLORA_TMA_LOAD("2d") ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(ctas)
      : "memory");
}

#undef FASTLORA_TMA_LOAD

// ---- Stores -----------------------------------------------------------------------------------
//
// Generic writes of the source need fence_proxy_async() and a barrier before the store is issued.
// A thread's stores between two commits are a group; waits count the groups of the calling thread.

__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, uint32_t shared, int x,
                                             int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the newest `Pending` groups have read their source: its memory may be written again.
template <int Pending>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// All but the newest `Pending` groups have written global memory.
template <int Pending>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- Proxy fences -----------------------------------------------------------------------------

// Generic accesses to shared memory before it are seen by TMA and wgmma after it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory that TMA will read.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace fastlora::sm90
