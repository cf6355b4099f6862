// out [m, rank] = scale * drop(x) [m, k] l^T on Hopper, at the speed of reading x.
//
// Tile: 64 rows x N ranks (16, 32, 64, 128) per CTA over all of k, in steps of 128. Grid: row
// blocks x rank blocks x splits. Where there are too few row blocks for the SMs, runs of k are
// summed by CTAs of their own, and down_sum_kernel adds their fp32 sums in order: the result never
// depends on timing.
//
// Who does what: one warpgroup (128 threads) does everything. In each step its threads start the
// copies (cp.async, 16 bytes each) of the x and l of stages - 1 steps later, then multiply: wgmma
// with both operands in shared memory. Many small CTAs with their own loads keep more bytes on
// their way than few large ones with a producer. An l that cannot be copied as it is (fp32, or
// unaligned) goes through registers, one step ahead.
//   kDrop: A comes through registers (ldmatrix), and the dropped elements are zeroed there. The
//   threads make the mask words of the next step, two each, while the tensor cores work, and pass
//   them on through shared memory: nothing is made twice.
//   128 more threads (only launched where there is a side job) make mask words for later kernels
//   and cast a matrix: sm90_side.cuh.
//
// Takes: any m, k, rank >= 1; any strides of l; rows of x aligned to 16 bytes.
// Shared memory: stages x (16 KiB of x + N * 256 bytes of l), swizzled; kDrop: 2 KiB of mask words.
// N = 16: 5 x 20 = 100 KiB, two CTAs an SM.
#pragma once

#include "common/sm90/cluster.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/mbarrier.cuh"
#include "common/sm90/narrow.cuh"
#include "common/sm90/pdl.cuh"
#include "common/sm90/tma.cuh"
#include "common/sm90/wgmma.cuh"
#include "down/sm90_load.cuh"
#include "down/sm90_shape.cuh"
#include "down/sm90_side.cuh"

namespace fastlora::sm90 {

// Makes the mask words of a step: 16 unit rows x 16 columns. Thread t has column t % 16 of unit
// rows t / 16 and that + 8, which lie 128 words apart.
struct WordMaker {
  PhiloxState state;
  PhiloxRow rows[2];
  uint32_t keep;
  int calls;

  __device__ __forceinline__ WordMaker(const DownArgs& args, int row0)
      : state(load_rng_state(args)), keep(args.keep), calls(args.calls) {
    const uint32_t row = row0 / 4 + threadIdx.x / 16;
    rows[0] = state.row(row);
    rows[1] = state.row(row + 8);
  }

  __device__ __forceinline__ void make(uint32_t shared, int step) const {
    const uint32_t column = step * (kDownK / 8) + threadIdx.x % 16;
    with_calls(calls, [&](auto calls) {
      constexpr int kCalls = decltype(calls)::value;
      const PhiloxWordColumns<kCalls> columns(state, column);
      const uint32_t first = keep_word<kCalls>(state, columns, rows[0], keep);
      const uint32_t second = keep_word<kCalls>(state, columns, rows[1], keep);
      store_shared(shared + threadIdx.x * 4, first);
      store_shared(shared + threadIdx.x * 4 + 512, second);
    });
  }
};

// All of a step's A, with the dropped elements zeroed. Warp w has rows 16 w .. 16 w + 15; of every
// word (8 columns of rows s, s + 8, s + 16, s + 24 of 32) a lane has columns 2 (lane % 4) and the
// next in rows s = lane / 4 and s + 8, or s + 16 and s + 24: two bits of each of two bytes. A shift
// puts the first bit of both pairs into the signs of their bytes, another one the second bit, and
// prmt widens the signs.
__device__ __forceinline__ void load_dropped(uint32_t (&a)[8][4], uint32_t x, uint32_t words) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp * 16 + lane % 16;
  const uint32_t from = x + row * 128;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t chunk = (i % 4 * 2 + lane / 16) ^ (row & 7);
    ldmatrix_x4(a[i], from + i / 4 * kDownXSlab + chunk * 16);
  }
  const uint32_t my_words = words + (warp / 2 * 8 + lane / 4) * 64;
  const int shift = 7 - lane % 4 * 2;
  const uint32_t first = warp % 2 == 0 ? 0xCC88 : 0xEEAA;  // signs of bytes 0, 4 or 2, 6
  const uint32_t second = first + 0x1111;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word[4];
    load_shared(word, my_words + i * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = word[j] << shift, high = word[j] << (shift - 1);
      uint32_t kept[2];
      asm("prmt.b32 %0, %1, %2, %3;" : "=r"(kept[0]) : "r"(low), "r"(high), "r"(first));
      asm("prmt.b32 %0, %1, %2, %3;" : "=r"(kept[1]) : "r"(low), "r"(high), "r"(second));
      a[i * 2 + j / 2][j % 2 * 2] &= kept[0];
      a[i * 2 + j / 2][j % 2 * 2 + 1] &= kept[1];
    }
  }
}

template <class T, int kN, bool kRMajor>
__device__ __forceinline__ uint64_t l_descriptor(uint32_t l, int i) {  // of 16 k
  if constexpr (kRMajor) {
    return descriptor_n_major<kN>(l, kDownK * 128) + i * kNextK16NMajor<kN>;
  } else {
    return descriptor_k_major(l) + i / 4 * (kN * 128 >> 4) + i % 4 * kNextK16;
  }
}

template <class T, int kN>
__device__ __forceinline__ void store_tile(const DownArgs& args, const float (&acc)[kN / 2],
                                           int row0, int rank0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pitch = gridDim.y * kN;
  const float factor = args.partial == nullptr ? load_factor(args) : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warp * 16 + half * 8 + lane / 4;
    if (row >= args.m) continue;
    float* const partial = args.partial + (int64_t{args.m} * blockIdx.z + row) * pitch;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const int column = rank0 + j * 8 + lane % 4 * 2;
      const float first = acc[j * 4 + half * 2], second = acc[j * 4 + half * 2 + 1];
      if (args.partial != nullptr) {
        *reinterpret_cast<float2*>(partial + column) = {first, second};
      } else {
        store_pair<T>(args, row, column, first * factor, second * factor);
      }
    }
    if (args.partial != nullptr || rank0 + kN != pitch) continue;
    for (int64_t column = pitch + lane % 4 * 2; column < args.out_pitch; column += 8) {
      store_pair<T>(args, row, column, 0, 0);  // padding beyond the last block
    }
  }
}

template <class T, int kN, bool kRMajor, bool kDrop>
__global__ void __launch_bounds__(kDownThreads + kDownSideThreads, kDrop || kN >= 64 ? 1 : 2)
    down_kernel(const __grid_constant__ DownArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  constexpr int kStageBytes = down_stage_bytes(kN);
  const uint32_t base = shared_address(shared);
  const int stages = args.stages;
  if (args.wait) pdl_wait();
  if (threadIdx.x >= kDownThreads) return side_jobs<T>(args);
#ifdef FASTLORA_SPIN_LIMIT
  if (base % 1024 != 0) __trap();
#endif

  const int row0 = blockIdx.x * kDownM, rank0 = blockIdx.y * kN;
  const auto splits = static_cast<int64_t>(gridDim.z);
  const int begin = static_cast<int>(args.steps * int64_t{blockIdx.z} / splits);
  const int end = static_cast<int>(args.steps * (int64_t{blockIdx.z} + 1) / splits);
  const bool copies_l = args.l_source == LSource::kCopy;
  const XShare x_share(args, row0);
  const LShare<T, kN, kRMajor> l_share(args, rank0);
  const auto load = [&](int step, int stage) {
    if (step < end) {
      const uint32_t to = base + stage * kStageBytes;
      x_share.copy(to, step * kDownK);
      if (copies_l) l_share.copy(args, to + kDownXBytes, step * kDownK);
    }
    copy_async_commit();  // of nothing at the end: then the waits still count right
  };

  for (int i = 0; i + 1 < stages; ++i) load(begin + i, i);
  if (!copies_l) l_share.read_write(args, base + kDownXBytes, begin * kDownK, 0);
  const uint32_t words = base + stages * kStageBytes;
  [[maybe_unused]] uint32_t words_half = 0;  // which half of the words this step uses
  struct Nothing {
    __device__ Nothing(const DownArgs&, int) {}
  };
  [[maybe_unused]] const std::conditional_t<kDrop, WordMaker, Nothing> maker(args, row0);
  if constexpr (kDrop) maker.make(words, begin);

  float acc[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
  int stage = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    copy_async_wait(stages - 2);
    fence_proxy_async();
    named_barrier_sync(1, kDownThreads);  // the step's data is there; the step before was read
    load(step + stages - 1, (stage == 0 ? stages : stage) - 1);

    const uint32_t x = base + stage * kStageBytes, l = x + kDownXBytes;
    if (++stage == stages) stage = 0;
    const uint32_t next_l = base + stage * kStageBytes + kDownXBytes;
    const bool reads_l = !copies_l && step + 1 < end;
    uint32_t raw[LShare<T, kN, kRMajor>::kBatch][8];
    if (reads_l) l_share.read(raw, args, (step + 1) * kDownK, 0);

    if constexpr (kDrop) {
      uint32_t a[8][4];
      load_dropped(a, x, words + words_half);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        Wgmma<kN>::template rs<T, kRMajor>(acc, a[i], l_descriptor<T, kN, kRMajor>(l, i), true);
      }
      wgmma_commit();
      words_half ^= kDownWordBytes;
      if (step + 1 < end) maker.make(words + words_half, step + 1);
    } else {
      const uint64_t a = descriptor_k_major(x);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        Wgmma<kN>::template ss<T, 0, kRMajor>(acc, a + i / 4 * (kDownXSlab >> 4) + i % 4 * kNextK16,
                                              l_descriptor<T, kN, kRMajor>(l, i), true);
      }
      wgmma_commit();
    }
    if (reads_l) {
      l_share.write(raw, args, next_l, 0);
      l_share.read_write(args, next_l, (step + 1) * kDownK, 1);
    }
    wgmma_wait<0>();
  }
  pin(acc);
  store_tile<T, kN>(args, acc, row0, rank0);
}

}  // namespace fastlora::sm90
