// Operands of wgmma that are contiguous along M or N and narrower than a 128-byte slab: 16 or 32
// elements, in the 32- or 64-byte swizzle (swizzled() of copy_async.cuh; TMA writes boxes of that
// width so). 64 and more: as descriptor_mn_major.
#pragma once

#include <cstdint>

namespace fastlora::sm90 {

// Bytes of a row (one k) of the operand's slabs.
template <int kN>
constexpr int kMnRowBytes = kN < 64 ? kN * 2 : 128;

// B [16, kN] with N contiguous, transpose flag 1: 8 rows of k are 8 * kMnRowBytes<kN> bytes, slabs
// of 64 columns are `slab_bytes` apart.
template <int kN>
__device__ __forceinline__ uint64_t descriptor_n_major(uint32_t shared, uint32_t slab_bytes) {
  constexpr int kBytes = kMnRowBytes<kN>;
  static_assert(kBytes == 32 || kBytes == 64 || kBytes == 128);
  constexpr uint64_t kSwizzle = kBytes == 32 ? 3 : kBytes == 64 ? 2 : 1;
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(slab_bytes >> 4) << 16 |
         static_cast<uint64_t>(8 * kBytes >> 4) << 32 | kSwizzle << 62;
}

// From one 16 of k to the next, in the descriptor's units.
template <int kN>
constexpr uint64_t kNextK16NMajor = 16 * kMnRowBytes<kN> >> 4;

// B [16, 8] of which every element is the same: any layout within 512 bytes reads it.
__device__ __forceinline__ uint64_t descriptor_constant(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | uint64_t{128 >> 4} << 16 |
         uint64_t{256 >> 4} << 32;
}

}  // namespace fastlora::sm90
