// cp.async: copies from global to shared memory by the threads themselves, any layout, without
// registers in between. And shared memory by its 32-bit address.
//
// A thread's copies between two commits are a group. After the wait its own copies are done; the
// other threads see them after a barrier, and wgmma after fence_proxy_async() before that barrier.
#pragma once

#include <cstdint>

namespace fastlora::sm90 {

// 16 bytes, of which those past the first `bytes` become zero and are not read. Addresses are
// multiples of 16.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

// The same, all 16 of them, of data that is read once: L2 lets go of it before anything else.
__device__ __forceinline__ void copy_async_16_once(uint32_t shared, const void* global) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(global), "l"(policy)
               : "memory");
}

// The same with 4 bytes.
__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// All but the newest `pending` groups of the thread, at most 6 of them, are complete.
__device__ __forceinline__ void copy_async_wait(int pending) {
  switch (pending) {
    case 0:
      return copy_async_wait<0>();
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    case 3:
      return copy_async_wait<3>();
    case 4:
      return copy_async_wait<4>();
    case 5:
      return copy_async_wait<5>();
    default:
      return copy_async_wait<6>();
  }
}
constexpr int kMostCopyStages = 8;  // of a ring of which all but two are pending

// Where byte `offset` of a tile with rows of kRowBytes is, in the layout that TMA and the tensor
// cores call the swizzle of that width: 16-byte chunks of a row change places by the row.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(uint32_t offset) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  return offset ^ (offset >> 3 & (kRowBytes - 16));
}

__device__ __forceinline__ void load_shared(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t (&out)[2], uint32_t shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, const uint32_t (&value)[2]) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(value[0]), "r"(value[1])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, const uint32_t (&value)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value[0]),
               "r"(value[1]), "r"(value[2]), "r"(value[3])
               : "memory");
}

}  // namespace fastlora::sm90
