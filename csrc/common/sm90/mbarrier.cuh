// mbarriers: the counters in shared memory through which TMA, tensor cores and warps hand over the
// slots of a ring. Thin wrappers of one PTX statement each.
//
// Barriers are named by their 32-bit shared address. A wait names a phase by its parity: a fresh
// barrier is in phase 0, so wait(b, 1) passes at once and wait(b, 0) waits for the first
// completion.
//
// -DFASTLORA_SPIN_LIMIT=<clocks, below 2^32> makes every wait trap when it lasts that long, so that
// a mistake in a kernel ends in an error and not in a hang.
#pragma once

#include <cstdint>

namespace fastlora::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `arrivals` of them, and all expected bytes, complete a phase.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, by the thread that made them: TMA and the other CTAs of the cluster see them
// (after the CTA or cluster barrier that follows).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once, and lets the phase wait for `bytes` more from TMA.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the barrier that has this address in CTA `rank` of the cluster (0 without a cluster).
// For barriers that guard reads by tensor cores or TMA: it orders nothing for generic accesses of
// other CTAs.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// True when the phase of that parity is over. May suspend the thread for a while first.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef FASTLORA_SPIN_LIMIT
  const auto start = static_cast<uint32_t>(clock());
  while (!mbarrier_try_wait(barrier, parity)) {
    if (static_cast<uint32_t>(clock()) - start > uint32_t{FASTLORA_SPIN_LIMIT}) __trap();
  }
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace fastlora::sm90
