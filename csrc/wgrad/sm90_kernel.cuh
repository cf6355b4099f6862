// d_a [rank, k] = g^T drop(x), d_b [n, rank] = dy^T h and d_bias [n] = the column sums of dy, in
// one launch on Hopper, at the speed of reading x and dy.
//
// Both products are out[c, r] = sum over m of v[m, c] u[m, r] with a wide v and a skinny u.
// Tile: 64 columns of v x N ranks (16, 32, 64, 128) per CTA over all rows m, in steps of 64. Grid:
// column blocks of x, then of dy x rank blocks x splits. Where there are too few columns for the
// SMs, runs of m are summed by CTAs of their own, and wgrad_sum_kernel adds their fp32 sums in
// order: the result never depends on timing.
//
// Who does what: one warpgroup (128 threads) does everything. In each step its threads start the
// copies (cp.async, 16 bytes each) of the v and u of stages - 1 steps later, then multiply: wgmma
// with both operands in shared memory as they came (v^T and u are contiguous along M and N). Many
// small CTAs with their own loads keep more bytes on their way than few large ones with a producer.
//   mask: its words come through the ring like v and u; v goes through registers (ldmatrix with
//   transposition), where the dropped elements are zeroed.
//   d_bias: a second product of v^T, with ones.
//
// Takes: any m, k, n, rank >= 1; rows aligned to 16 bytes.
// Shared memory: stages x (8 KiB of v, 128-byte swizzle, + N * 128 bytes of u in slabs of at most
// 64 ranks + 512 bytes of mask words), 512 bytes of ones. N = 16: 8 x 10.5 = 84 KiB.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/sm90/cluster.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/narrow.cuh"
#include "common/sm90/pdl.cuh"
#include "common/sm90/store_as.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"

namespace fastlora::sm90 {

constexpr int kWgradRows = 64, kWgradColumns = 64;  // of v in a step
constexpr int kWgradThreads = 128;                  // a warpgroup
constexpr int kWgradVBytes = kWgradRows * 128;
constexpr int kWgradWordBytes = kWgradRows * kWgradColumns / 32 * 4;
constexpr int kWgradOnesBytes = 512;

template <int kN>
constexpr int kWgradTileBytes = kWgradVBytes + kN * kWgradRows * 2;

struct WgradProduct {
  const void* v;
  const void* u;
  int64_t v_pitch, u_pitch;  // bytes
  int columns;
  void* out;                           // or partial sums, of fp32, `split` elements apart
  int64_t stride_column, stride_rank;  // of out
  int64_t split;
  int type;    // GradType
  bool pairs;  // two ranks can be stored at once
};

struct WgradArgs {
  WgradProduct product[2];
  int blocks_first;  // column blocks of the first product
  void* bias;        // or partial sums, bias_split elements apart; or null
  int64_t bias_split;
  int bias_type;
  const uint32_t* words;
  int64_t words_pitch;
  int m, rank;
  int steps, stages;
  bool wait;
};

// A thread's share of the tiles: chunks of 16 bytes a fixed number of rows apart. Past the edges
// chunks, and parts of chunks, are zero.
template <int kRowBytes, int kChunksOfRow>
struct WgradShare {
  static constexpr int kRowStep = kWgradThreads / kChunksOfRow;
  static constexpr int kChunks = kWgradRows / kRowStep;
  static constexpr int kToStep = kRowStep * kRowBytes;  // the swizzle repeats after less
  static_assert(kToStep % 1024 == 0);
  const char* from;
  int64_t pitch;
  int rows, bytes;
  uint32_t to;

  __device__ __forceinline__ WgradShare(const void* data, int64_t row_pitch, int m, int columns,
                                        int column0) {
    const int row = threadIdx.x / kChunksOfRow, chunk = threadIdx.x % kChunksOfRow;
    const int column = column0 + chunk * 8;
    from = static_cast<const char*>(data) + row * row_pitch + column * int64_t{2};
    pitch = row_pitch;
    rows = m - row;
    bytes = min(max(columns - column, 0), 8) * 2;
    to = chunk / 8 * (kWgradRows * 128) + swizzled<kRowBytes>(row * kRowBytes + chunk % 8 * 16);
  }

  __device__ __forceinline__ void copy(uint32_t shared, int row0) const {
    const char* source = from + row0 * pitch;
#pragma unroll
    for (int i = 0; i < kChunks; ++i, source += kRowStep * pitch) {
      copy_async_16(shared + to + i * kToStep, source, i * kRowStep < rows - row0 ? bytes : 0);
    }
  }
};

// A step's mask words, one a thread: 16 unit rows x 8 columns.
struct WgradWordShare {
  const uint32_t* from;
  int64_t pitch;
  int rows;

  __device__ __forceinline__ WgradWordShare(const WgradArgs& args, int column0) {
    const int row = threadIdx.x / 8, column = column0 / 8 + threadIdx.x % 8;
    pitch = args.words_pitch;
    from = args.words + row * pitch + column;
    rows = column < pitch ? static_cast<int>((int64_t{args.m} + 31) / 32 * 8) - row : 0;
  }

  __device__ __forceinline__ void copy(uint32_t shared, int step) const {
    const int row0 = step * (kWgradRows / 4);
    copy_async_4(shared + threadIdx.x * 4, from + row0 * pitch, row0 < rows ? 4 : 0);
  }
};

// All of a step's A = v^T, with the dropped elements zeroed. Warp w has columns 16 w .. 16 w + 15:
// words 2 w and 2 w + 1 of a unit row. A lane has column lane / 4 of both, in rows s = 2 (lane % 4)
// and the next and every 8th from there: one bit of each byte of four words for 32 rows. A shift
// puts it into the sign of the byte, and prmt widens the signs of two words, of two rows.
__device__ __forceinline__ void load_dropped_columns(uint32_t (&a)[4][4], uint32_t v,
                                                     uint32_t words) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Of the four 8 x 8 matrices of a fragment: m + 8 from the third on, columns + 8 in the odd ones.
  const int row = lane / 16 * 8 + lane % 8, chunk = warp * 2 + lane / 8 % 2;
  const uint32_t from = v + row * 128 + (chunk ^ (row & 7)) * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(a[i], from + i * 16 * 128);
  const uint32_t my_words = words + lane % 4 * 2 * 32 + warp * 8;
  const int shift = 7 - lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // 32 rows
    uint32_t even[2], odd[2];
    load_shared(even, my_words + i * 256);
    load_shared(odd, my_words + i * 256 + 32);
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const uint32_t low = even[column] << shift, high = odd[column] << shift;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {  // rows 8 byte + s
        uint32_t kept;
        asm("prmt.b32 %0, %1, %2, %3;"
            : "=r"(kept)
            : "r"(low), "r"(high), "r"(0xCC88 + byte * 0x1111));
        a[i * 2 + byte / 2][byte % 2 * 2 + column] &= kept;
      }
    }
  }
}

template <class T, int kN, bool kMask, bool kBias>
__device__ __forceinline__ void sum_rows(const WgradArgs& args, const WgradProduct& product,
                                         uint32_t base, int column0, int rank0,
                                         float (&acc)[kN / 2], float (&bias)[4]) {
  constexpr int kStageBytes = kWgradTileBytes<kN>;
  const int stages = args.stages;
  const uint32_t ones = base + stages * kStageBytes, words = ones + kWgradOnesBytes;
  const auto splits = static_cast<int64_t>(gridDim.z);
  const int begin = static_cast<int>(args.steps * int64_t{blockIdx.z} / splits);
  const int end = static_cast<int>(args.steps * (int64_t{blockIdx.z} + 1) / splits);
  const WgradShare<128, 8> v_share(product.v, product.v_pitch, args.m, product.columns, column0);
  const WgradShare<kMnRowBytes<kN>, kN / 8> u_share(product.u, product.u_pitch, args.m, args.rank,
                                                    rank0);
  const WgradWordShare word_share(args, column0);
  const auto load = [&](int step, int stage) {
    if (step < end) {
      const uint32_t to = base + stage * kStageBytes;
      v_share.copy(to, step * kWgradRows);
      u_share.copy(to + kWgradVBytes, step * kWgradRows);
      if constexpr (kMask) word_share.copy(words + stage * kWgradWordBytes, step);
    }
    copy_async_commit();  // of nothing at the end: then the waits still count right
  };

  for (int i = 0; i + 1 < stages; ++i) load(begin + i, i);
  if constexpr (kBias) store_shared(ones + threadIdx.x * 4, pack<T>(1.f, 1.f));

  int stage = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    copy_async_wait(stages - 2);
    fence_proxy_async();
    __syncthreads();  // the step's data is there; the step before was read
    load(step + stages - 1, (stage == 0 ? stages : stage) - 1);

    const uint32_t v = base + stage * kStageBytes;
    const uint64_t u = descriptor_n_major<kN>(v + kWgradVBytes, kWgradRows * 128);
    if constexpr (kMask) {
      uint32_t a[4][4];
      load_dropped_columns(a, v, words + stage * kWgradWordBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kN>::template rs<T, 1>(acc, a[i], u + i * kNextK16NMajor<kN>, true);
      }
      wgmma_commit();
    } else {
      const uint64_t a = descriptor_mn_major(v, kWgradVBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Wgmma<kN>::template ss<T, 1, 1>(acc, a + i * kNextK16MnMajor, u + i * kNextK16NMajor<kN>,
                                        true);
        if constexpr (kBias) {
          Wgmma<8>::template ss<T, 1, 0>(bias, a + i * kNextK16MnMajor, descriptor_constant(ones),
                                         true);
        }
      }
      wgmma_commit();
    }
    if (++stage == stages) stage = 0;
    wgmma_wait<0>();
  }
  pin(acc);
  pin(bias);
}

// Of indices that are even.
__device__ __forceinline__ void store_pair_as(void* out, int64_t index, float a, float b,
                                              int type) {
  if (type == 0) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = {a, b};
  } else {
    const uint32_t packed = type == 1 ? pack<__nv_bfloat16>(a, b) : pack<__half>(a, b);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + index) = packed;
  }
}

template <class T, int kN>
__global__ void __launch_bounds__(kWgradThreads)
    wgrad_kernel(const __grid_constant__ WgradArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  if (args.wait) pdl_wait();
#ifdef FASTLORA_SPIN_LIMIT
  if (base % 1024 != 0) __trap();
#endif

  const int block = blockIdx.x;
  const bool second = block >= args.blocks_first;
  const WgradProduct& product = args.product[second];
  const int column0 = (second ? block - args.blocks_first : block) * kWgradColumns;
  const int rank0 = blockIdx.y * kN;
  const bool with_bias = second && args.bias != nullptr && blockIdx.y == 0;

  float acc[kN / 2], bias[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
  if (with_bias) {
    sum_rows<T, kN, false, true>(args, product, base, column0, rank0, acc, bias);
  } else if (!second && args.words != nullptr) {
    sum_rows<T, kN, true, false>(args, product, base, column0, rank0, acc, bias);
  } else {
    sum_rows<T, kN, false, false>(args, product, base, column0, rank0, acc, bias);
  }

  // Neighbouring lanes have neighbouring columns (lane / 4) and ranks (lane % 4): sectors are full
  // whichever of the two is contiguous.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t split = product.split * blockIdx.z;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = column0 + warp * 16 + half * 8 + lane / 4;
    if (column >= product.columns) continue;
    const int64_t row = split + column * product.stride_column;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const int rank = rank0 + j * 8 + lane % 4 * 2;
      const float first = acc[j * 4 + half * 2], next = acc[j * 4 + half * 2 + 1];
      if (rank >= args.rank) continue;
      const int64_t at = row + rank * product.stride_rank;
      if (product.pairs) {
        store_pair_as(product.out, at, first, next, product.type);
      } else {
        store_as(product.out, at, first, product.type);
        if (rank + 1 < args.rank) {
          store_as(product.out, at + product.stride_rank, next, product.type);
        }
      }
    }
    if (with_bias && lane % 4 == 0) {
      store_as(args.bias, args.bias_split * blockIdx.z + column, bias[half * 2], args.bias_type);
    }
  }
}

// ---- Sums of partial sums -----------------------------------------------------------------------

struct WgradSum {
  const float* partial;  // [splits, split], of which the first `count` of each row count
  void* out;
  int64_t count, split;
  int type;
};

struct WgradSums {
  WgradSum sum[3];  // d_a, d_b, d_bias; count 0 where there is none
  int splits;
  bool wait;
};

// Each of the sums in index order, an element a thread.
__global__ void __launch_bounds__(256) wgrad_sum_kernel(const __grid_constant__ WgradSums args) {
  if (args.wait) pdl_wait();
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const WgradSum& sum = args.sum[s];
    if (i < sum.count) {
      float total = 0;
#pragma unroll 4
      for (int split = 0; split < args.splits; ++split) total += sum.partial[split * sum.split + i];
      store_as(sum.out, i, total, sum.type);
      return;
    }
    i -= sum.count;
  }
}

}  // namespace fastlora::sm90
