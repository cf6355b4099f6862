// The loading warps of the kernel for few rows (sm90_kernel.cuh).
#pragma once

#include "common/sm90/copy_async.cuh"
#include "common/sm90/wgmma.cuh"
#include "few/sm90_shape.cuh"

namespace fastlora::sm90 {

template <class Shape>
__device__ __forceinline__ void few_produce(FewWork<Shape> work, const FewMaps& maps) {
  const FewArgs& args = work.args;
  const auto peers =
      static_cast<uint16_t>(((1 << args.cluster_m) - 1) << (work.split * args.cluster_m));
  // What the CTAs that share W load of a slab each: rows of it, 128 bytes long.
  const int k_rows = kFewDepth / args.cluster_m, k_row = work.row_part * k_rows;
  const int w_rows = Shape::kC / args.cluster_m, w_row = work.row_part * w_rows;
  const int a_rows = max(8, Shape::kN / args.cluster_m), a_row = work.row_part * a_rows;
  for (int i = 0; i < work.steps; ++i) {
    const int k = (work.first + i) * kFewDepth;
    mbarrier_wait(work.empty(), work.phase ^ 1);
    const uint32_t full = work.full();
    mbarrier_arrive_expect(full, args.x_bytes + Shape::kWBytes + Shape::kLoadedABytes);
    const auto load = [&](uint32_t to, const CUtensorMap* map, int column, int row) {
      if (args.cluster_m == 1) {
        tma_load_2d(to, map, full, column, row);
      } else {
        tma_load_2d_multicast(to, map, full, column, row, peers);
      }
    };
    tma_load_2d(work.x(), &maps.x, full, k, work.row0);
    const uint32_t a = Shape::kFloatA ? work.float_a() : work.a();
    constexpr int kBoxes = Shape::kFloatA ? Shape::kBoxes : 1;
    if constexpr (Shape::kMnMajor) {
#pragma unroll
      for (int slab = 0; slab < Shape::kC / 64; ++slab) {
        load(work.w() + slab * kFewSlabBytes + k_row * 128, &maps.w, work.col0 + slab * 64,
             k + k_row);
      }
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        load(a + box * Shape::kBoxBytes + k_row * 128, &maps.a, box * 32, k + k_row);
      }
    } else {
      load(work.w() + w_row * 128, &maps.w, k, work.col0 + w_row);
#pragma unroll
      for (int box = 0; box < kBoxes && a_row < Shape::kN; ++box) {
        load(a + box * Shape::kBoxBytes + a_row * 128, &maps.a, k + box * 32, a_row);
      }
    }
    work.advance();
  }
}

// Eight values from global or shared memory as eight of T.
template <class T>
__device__ __forceinline__ uint4 round8(float4 low, float4 high) {
  return {pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y),
          pack<T>(high.z, high.w)};
}
__device__ __forceinline__ float4 load_shared_float4(uint32_t shared) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_16(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// A chunk of 8 of B's tile: its rank, its column in the tile, and where it lies for the tensor
// cores: [kC, kN] K-major, or slabs of 64 columns [kN, 64].
struct FewChunk {
  int rank, column;
  uint32_t offset;
};
template <class Shape>
__device__ __forceinline__ FewChunk b_chunk(int chunk) {
  if constexpr (Shape::kMnMajor) {
    const int rank = chunk / (Shape::kC / 8), at = chunk % (Shape::kC / 8);
    return {rank, at * 8, at / 8 * (Shape::kN * 128) + swizzled<128>(rank * 128 + at % 8 * 16)};
  } else {
    constexpr int kRowBytes = Shape::kN * 2;
    const int column = chunk / (Shape::kN / 8), at = chunk % (Shape::kN / 8);
    return {at * 8, column, swizzled<kRowBytes>(column * kRowBytes + at * 16)};
  }
}

// A of a step from fp32 (boxes of 32 columns) to T, by a warp: [kN, 64], or [64, kN].
template <class T, class Shape>
__device__ __forceinline__ void round_a(uint32_t to, uint32_t from, int lane) {
  constexpr int kAtOnce = 4, kRowChunks = Shape::kMnMajor ? Shape::kN / 8 : 8;
#pragma unroll 1
  for (int first = lane; first < Shape::kN * 8; first += kAtOnce * 32) {
    float4 values[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = (first + 32 * i) / kRowChunks, at = (first + 32 * i) % kRowChunks;
      const uint32_t box = from + at / 4 * Shape::kBoxBytes;
      const uint32_t offset = row * 128 + at % 4 * 32;
      values[i][0] = load_shared_float4(box + swizzled<128>(offset));
      values[i][1] = load_shared_float4(box + swizzled<128>(offset + 16));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = (first + 32 * i) / kRowChunks, at = (first + 32 * i) % kRowChunks;
      store_shared_16(to + swizzled<128>(row * 128 + at * 16),
                      round8<T>(values[i][0], values[i][1]));
    }
  }
}

// The side warps: B, then A [kN, 64] of every step to 16 bits, if it is fp32.
template <class T, class Shape>
__device__ __forceinline__ void few_side(FewWork<Shape> work, int thread, int lane) {
  const FewArgs& args = work.args;
  const auto done = [&](uint32_t barrier) {
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };
#pragma unroll 4
  for (int i = thread; i < Shape::kC * Shape::kN / 8; i += kFewSideWarps * 32) {
    const FewChunk chunk = b_chunk<Shape>(i);
    const int64_t column = work.col0 + chunk.column;
    const int64_t from =
        Shape::kMnMajor ? chunk.rank * args.b_pitch + column : column * args.b_pitch + chunk.rank;
    uint4 value = {0, 0, 0, 0};
    if (column < args.n && chunk.rank < args.rank) {
      if (args.b_float) {
        const auto* const b =
            reinterpret_cast<const float4*>(static_cast<const float*>(args.b) + from);
        value = round8<T>(__ldg(b), __ldg(b + 1));
      } else {
        value = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.b) + from));
      }
    }
    store_shared_16(work.b() + chunk.offset, value);
  }
  done(work.b_there());
  if constexpr (Shape::kFloatA) {
    for (int i = 0; i < work.steps; ++i, work.advance()) {
      if (work.stage % kFewSideWarps != thread / 32) continue;  // a warp has whole stages
      mbarrier_wait(work.full(), work.phase);
      round_a<T, Shape>(work.a(), work.float_a(), lane);
      done(work.rounded());
    }
  }
}

}  // namespace fastlora::sm90
