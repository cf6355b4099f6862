// Hopper's tensor cores: D [64, N] (+)= A [64, 16] B [16, N] by the four warps of a warpgroup, fp32
// accumulators in registers, bf16 or fp16 operands in shared memory (A also in registers).
//
// Layout of D, and of A in registers: warp w of the warpgroup has rows 16 w .. 16 w + 15. Thread
// `lane` has in d[4 i + 0, 1] row lane / 4 and in d[4 i + 2, 3] row lane / 4 + 8, columns
// 8 i + 2 (lane % 4) and the next. A: a[0], a[1] columns 0..7 of the two rows, a[2], a[3] columns
// 8..15, two elements a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastlora::sm90 {

// ---- Shared memory operands -------------------------------------------------------------------
//
// Tiles are made of slabs 128 bytes (64 elements) wide, as TMA writes a 64-element-wide box with
// the 128-byte swizzle, at multiples of 1024. Fields count in 16 bytes: address, leading and stride
// offset; 1 in the top bits is that swizzle.

__device__ __forceinline__ uint64_t descriptor(uint32_t shared, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         uint64_t{1} << 62;
}

// K is contiguous: a slab holds 64 k of every row, 8 rows are 1024 bytes. Transpose flag 0.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t shared) {
  return descriptor(shared, 16, 1024);
}
// The same of slabs kWidth k wide, 16 or 64: TMA's swizzle of 32 or 128 bytes.
template <int kWidth>
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t shared) {
  static_assert(kWidth == 16 || kWidth == 64);
  if constexpr (kWidth == 64) return descriptor_k_major(shared);
  return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         uint64_t{256 >> 4} << 32 | uint64_t{3} << 62;
}
// The next 16 k of the same slab.
constexpr uint64_t kNextK16 = 32 >> 4;

// Rows (M of A, N of B) are contiguous: a slab holds 64 of them at every k, 8 k are 1024 bytes, and
// the next 64 are one slab further. Transpose flag 1.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t shared, uint32_t slab_bytes) {
  return descriptor(shared, slab_bytes, 1024);
}
// The next 16 k: 16 rows of 128 bytes.
constexpr uint64_t kNextK16MnMajor = 2048 >> 4;

// ---- Ordering ---------------------------------------------------------------------------------

// Before the first wgmma that uses registers which other instructions wrote.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the newest `Pending` groups are complete: their operands were read; accumulators can be
// used only when nothing that writes them is pending.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving uses of accumulators across a wait: it cannot see that wgmma
// writes them later.
template <int Count>
__device__ __forceinline__ void pin(float (&values)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// ---- The instructions -------------------------------------------------------------------------
//
// Wgmma<N>::ss<T, TransA, TransB>(d, a, b, accumulate): both operands by descriptor.
// Wgmma<N>::rs<T, TransB>(d, a, b, accumulate): A in registers. accumulate = false starts from 0.

template <int N>
struct Wgmma;

// Names of accumulators in the assembly text: "%0, ... %9" for tens = "", "%10, ... %19" for "1".
#define FL_TEN(tens)                                                               \
  "%" tens "0, %" tens "1, %" tens "2, %" tens "3, %" tens "4, %" tens "5, %" tens \
  "6, "                                                                            \
  "%" tens "7, %" tens "8, %" tens "9, "
#define FL_NAMES_4 "%0, %1, %2, %3"
#define FL_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FL_NAMES_16 FL_TEN("") "%10, %11, %12, %13, %14, %15"
#define FL_NAMES_32 FL_TEN("") FL_TEN("1") FL_TEN("2") "%30, %31"
#define FL_NAMES_40 \
  FL_TEN("") FL_TEN("1") FL_TEN("2") "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define FL_NAMES_64 \
  FL_TEN("") FL_TEN("1") FL_TEN("2") FL_TEN("3") FL_TEN("4") FL_TEN("5") "%60, %61, %62, %63"
#define FL_NAMES_72 \
  FL_TEN("")        \
  FL_TEN("1") FL_TEN("2") FL_TEN("3") FL_TEN("4") FL_TEN("5") FL_TEN("6") "%70, %71"
#define FL_NAMES_96 \
  FL_TEN("")        \
  FL_TEN("1")       \
  FL_TEN("2")       \
  FL_TEN("3") FL_TEN("4") FL_TEN("5") FL_TEN("6") FL_TEN("7") FL_TEN("8") "%90, %91, %92, " \
                                                                          "%93, %94, %95"
#define FL_NAMES_128 \
  FL_TEN("")         \
  FL_TEN("1")        \
  FL_TEN("2")        \
  FL_TEN("3")        \
  FL_TEN("4")        \
  FL_TEN("5")        \
  FL_TEN("6")        \
  FL_TEN("7")        \
  FL_TEN("8") FL_TEN("9") FL_TEN("10") FL_TEN("11") "%120, %121, %122, %123, %124, %125, %126, " \
                                                    "%127"

// The accumulators as operands.
#define FL_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FL_D8(i) FL_D4(i), FL_D4(i + 4)
#define FL_D16(i) FL_D8(i), FL_D8(i + 8)
#define FL_D32(i) FL_D16(i), FL_D16(i + 16)
#define FL_D40(i) FL_D32(i), FL_D8(i + 32)
#define FL_D64(i) FL_D32(i), FL_D32(i + 32)
#define FL_D72(i) FL_D64(i), FL_D8(i + 64)
#define FL_D96(i) FL_D64(i), FL_D32(i + 64)
#define FL_D128(i) FL_D64(i), FL_D64(i + 64)

// p0 .. p6: the numbers of the operands after the accumulators.
#define FL_SS(type, n, count, p0, p1, p2, p3, p4)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2                                      \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type               \
               " {" FL_NAMES_##count "}, %" p0 ", %" p1 ", p, 1, 1, %" p3 ", %" p4 ";\n}\n" \
               : FL_D##count(0)                                                             \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransA), "n"(TransB))
#define FL_RS(type, n, count, p0, p1, p2, p3, p4, p5, p6)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p5                               \
               ", 0;\n"                                                              \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type        \
               " {" FL_NAMES_##count "}, {%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" p4 \
                                     ", p, 1, 1, %" p6 ";\n}\n"                      \
               : FL_D##count(0)                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                 \
                 "r"(static_cast<int>(accumulate)), "n"(TransB))

#define FL_WGMMA(n, count, p0, p1, p2, p3, p4, p5, p6)                                   \
  template <>                                                                            \
  struct Wgmma<n> {                                                                      \
    template <class T, int TransA, int TransB>                                           \
    static __device__ __forceinline__ void ss(float (&d)[count], uint64_t a, uint64_t b, \
                                              bool accumulate) {                         \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                  \
        FL_SS("bf16", #n, count, p0, p1, p2, p3, p4);                                    \
      } else {                                                                           \
        static_assert(std::is_same_v<T, __half>);                                        \
        FL_SS("f16", #n, count, p0, p1, p2, p3, p4);                                     \
      }                                                                                  \
    }                                                                                    \
    template <class T, int TransB>                                                       \
    static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t (&a)[4], \
                                              uint64_t b, bool accumulate) {             \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                  \
        FL_RS("bf16", #n, count, p0, p1, p2, p3, p4, p5, p6);                            \
      } else {                                                                           \
        static_assert(std::is_same_v<T, __half>);                                        \
        FL_RS("f16", #n, count, p0, p1, p2, p3, p4, p5, p6);                             \
      }                                                                                  \
    }                                                                                    \
  };

FL_WGMMA(8, 4, "4", "5", "6", "7", "8", "9", "10")
FL_WGMMA(16, 8, "8", "9", "10", "11", "12", "13", "14")
FL_WGMMA(32, 16, "16", "17", "18", "19", "20", "21", "22")
FL_WGMMA(64, 32, "32", "33", "34", "35", "36", "37", "38")
FL_WGMMA(80, 40, "40", "41", "42", "43", "44", "45", "46")
FL_WGMMA(128, 64, "64", "65", "66", "67", "68", "69", "70")
FL_WGMMA(144, 72, "72", "73", "74", "75", "76", "77", "78")
FL_WGMMA(192, 96, "96", "97", "98", "99", "100", "101", "102")
FL_WGMMA(256, 128, "128", "129", "130", "131", "132", "133", "134")

#undef FL_WGMMA
#undef FL_RS
#undef FL_SS
#undef FL_D128
#undef FL_D96
#undef FL_D72
#undef FL_D64
#undef FL_D40
#undef FL_D32
#undef FL_D16
#undef FL_D8
#undef FL_D4
#undef FL_NAMES_128
#undef FL_NAMES_96
#undef FL_NAMES_72
#undef FL_NAMES_64
#undef FL_NAMES_40
#undef FL_NAMES_32
#undef FL_NAMES_16
#undef FL_NAMES_8
#undef FL_NAMES_4
#undef FL_TEN

// ---- Fragments between registers and shared memory --------------------------------------------
//
// Four 8x8 matrices of 16-bit elements. Lanes 8 i .. 8 i + 7 give the addresses of the rows (16
// bytes) of matrix i; of each, a lane holds elements 2 (lane % 4) and the next of row lane / 4 (or,
// with _trans, of column lane / 4).

__device__ __forceinline__ void stmatrix_x4(uint32_t shared, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

// Two fp32 values to one register: `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// And back.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

}  // namespace fastlora::sm90
