// Flags in global memory between the CTAs of one launch.
#pragma once

#include <cstdint>

#include "common/sm90/tma.cuh"

namespace fastlora::sm90 {

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// kSleep: ns between looks, for those who are in no hurry.
template <int kSleep = 0>
__device__ __forceinline__ void wait_at_least(const uint32_t* at, uint32_t value) {
#ifdef FASTLORA_SPIN_LIMIT
  const auto start = static_cast<uint32_t>(clock());
#endif
  while (load_acquire(at) < value) {
    if constexpr (kSleep > 0) __nanosleep(kSleep);
#ifdef FASTLORA_SPIN_LIMIT
    if (static_cast<uint32_t>(clock()) - start > uint32_t{FASTLORA_SPIN_LIMIT}) __trap();
#endif
  }
}

__device__ __forceinline__ void add_release(uint32_t* at) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}

// The same within a CTA, of shared memory.
__device__ __forceinline__ void wait_shared_at_least(uint32_t at, uint32_t value) {
  while (true) {
    uint32_t now;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(now) : "r"(at) : "memory");
    if (now >= value) return;
    __nanosleep(200);
  }
}
__device__ __forceinline__ void add_release_shared(uint32_t at) {
  asm volatile("red.release.cta.shared.add.u32 [%0], 1;" ::"r"(at) : "memory");
}

// The warp has written something that TMA will read: `at` (and `also`) count it.
__device__ __forceinline__ void announce(uint32_t* at, uint32_t* also, int lane) {
  fence_proxy_async_global();
  __threadfence();
  __syncwarp();
  if (lane != 0) return;
  add_release(at);
  if (also != nullptr) add_release(also);
}

}  // namespace fastlora::sm90
