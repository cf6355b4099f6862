// How a step's x and l come to shared memory (sm90_kernel.cuh), by all threads of the warpgroup.
//
// A thread's share of either tile is chunks of 16 bytes a fixed stride apart, both in memory and in
// shared memory, where the stride is a multiple of what the swizzle repeats after. Past the edges
// of x and l chunks, and parts of chunks, are zero.
#pragma once

#include "common/sm90/copy_async.cuh"
#include "common/sm90/narrow.cuh"
#include "common/sm90/wgmma.cuh"
#include "down/sm90_shape.cuh"

namespace fastlora::sm90 {

// Chunk `column` (of 16) of row `row` (of 8, then every eighth) of tiles [rows, 128] with k
// contiguous: two slabs of 64 columns.
template <int kRows>
__device__ __forceinline__ uint32_t offset_k_major(int row, int column) {
  return column / 8 * (kRows * 128) + swizzled<128>(row * 128 + column % 8 * 16);
}

struct XShare {
  static constexpr int kChunks = kDownM / 8;
  const char* from;
  int64_t stride;  // bytes, of 8 rows
  int rows, columns;
  uint32_t to;

  __device__ __forceinline__ XShare(const DownArgs& args, int row0) {
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
    from = static_cast<const char*>(args.x) + (row0 + row) * args.x_pitch + column * 16;
    stride = 8 * args.x_pitch;
    rows = args.m - row0 - row;
    columns = args.k - column * 8;
    to = offset_k_major<kDownM>(row, column);
  }

  __device__ __forceinline__ void copy(uint32_t shared, int k0) const {
    const int bytes = min(max(columns - k0, 0), 8) * 2;
    const char* source = from + int64_t{k0} * 2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i, source += stride) {
      copy_async_16(shared + to + i * 1024, source, i * 8 < rows ? bytes : 0);
    }
  }
};

// kRMajor = false: chunks are 8 neighbouring k of a rank, the tile [kN, 128] is like that of x.
// kRMajor = true: chunks are 8 neighbouring ranks of a k, the tile is [128, kN], in slabs of at
// most 64 ranks (narrow.cuh).
template <class T, int kN, bool kRMajor>
struct LShare {
  static constexpr int kChunks = kN / 8;
  // Chunks that a thread has in registers at once; beside many accumulators, fewer.
  static constexpr int kBatch = kN == 128 ? 4 : kChunks;
  static constexpr int kColumns = kRMajor ? kN / 8 : 16;  // chunks of a row of the tile
  static constexpr int kRowStep = kDownThreads / kColumns;
  static constexpr int kToStep = kRMajor ? kRowStep * kMnRowBytes<kN> : 1024;
  static_assert(kToStep % 1024 == 0);

  int64_t from, stride;  // elements
  int rows, columns;     // left of the tile's rows and columns, at k = 0
  uint32_t to;

  __device__ __forceinline__ LShare(const DownArgs& args, int rank0) {
    const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
    if constexpr (kRMajor) {
      from = row * args.l_stride_k + rank0 + column * 8;
      stride = kRowStep * args.l_stride_k;
      rows = args.k - row;
      columns = args.rank - rank0 - column * 8;
      to = column / 8 * (kDownK * 128) +
           swizzled<kMnRowBytes<kN>>(row * kMnRowBytes<kN> + column % 8 * 16);
    } else {
      from = (rank0 + row) * args.l_stride_rank + column * 8 * args.l_stride_k;
      stride = kRowStep * args.l_stride_rank;
      rows = args.rank - rank0 - row;
      columns = args.k - column * 8;
      to = offset_k_major<kN>(row, column);
    }
  }

  // Elements of chunk i that exist.
  __device__ __forceinline__ int count(int i, int k0) const {
    const int rows_left = kRMajor ? rows - k0 : rows;
    const int columns_left = kRMajor ? columns : columns - k0;
    return i * kRowStep < rows_left ? min(max(columns_left, 0), 8) : 0;
  }

  // ---- T, aligned: as it is ----
  __device__ __forceinline__ void copy(const DownArgs& args, uint32_t shared, int k0) const {
    const T* source = static_cast<const T*>(args.l) + from + k0 * args.l_stride_k;
#pragma unroll
    for (int i = 0; i < kChunks; ++i, source += stride) {
      copy_async_16(shared + to + i * kToStep, source, count(i, k0) * 2);
    }
  }

  // ---- Anything else: through registers, rounded on the way ----
  __device__ __forceinline__ void read(uint32_t (&raw)[kBatch][8], const DownArgs& args, int k0,
                                       int batch) const {
    const int64_t next = kRMajor ? 1 : args.l_stride_k;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = batch * kBatch + j, elements = count(i, k0);
      const int64_t at = from + i * stride + k0 * args.l_stride_k;
      if (args.l_source == LSource::kFloatVector && elements == 8) {
        const auto* source = reinterpret_cast<const uint4*>(static_cast<const float*>(args.l) + at);
        const uint4 low = source[0], high = source[1];
        raw[j][0] = low.x, raw[j][1] = low.y, raw[j][2] = low.z, raw[j][3] = low.w;
        raw[j][4] = high.x, raw[j][5] = high.y, raw[j][6] = high.z, raw[j][7] = high.w;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          raw[j][e] = 0;
          if (e >= elements) continue;
          raw[j][e] = args.l_source == LSource::kShort
                          ? static_cast<const uint16_t*>(args.l)[at + e * next]
                          : static_cast<const uint32_t*>(args.l)[at + e * next];
        }
      }
    }
  }

  __device__ __forceinline__ void write(const uint32_t (&raw)[kBatch][8], const DownArgs& args,
                                        uint32_t shared, int batch) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      uint32_t chunk[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t low = raw[j][2 * e], high = raw[j][2 * e + 1];
        chunk[e] = args.l_source == LSource::kShort
                       ? low | high << 16
                       : pack<T>(__uint_as_float(low), __uint_as_float(high));
      }
      store_shared(shared + to + (batch * kBatch + j) * kToStep, chunk);
    }
  }

  // The batches from `first` on.
  __device__ __forceinline__ void read_write(const DownArgs& args, uint32_t shared, int k0,
                                             int first) const {
#pragma unroll 1
    for (int batch = first; batch < kChunks / kBatch; ++batch) {
      uint32_t raw[kBatch][8];
      read(raw, args, k0, batch);
      write(raw, args, shared, batch);
    }
  }
};

}  // namespace fastlora::sm90
