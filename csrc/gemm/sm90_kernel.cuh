// y [m, n] = x [m, k] W^T + bias + (mask o) h [m, rank] L^T on Hopper.
//
// Tile: BM x BN of y per CTA, 64 of k per step; fp32 accumulators in registers, rounded once. The
// rank is more of k: after the k/64 steps of x and W come ceil(rank/64) steps of h and L, through
// the same ring. With a mask they come first: the accumulators are masked, and the rest is added.
//
// Who does what (384 threads, one CTA per SM, each walks over many tiles):
//   warpgroup 0 (sm90_producer.cuh): one thread fills the ring by TMA and runs ahead into the next
//     tile.
//   warpgroups 1, 2 (sm90_consumer.cuh): each multiplies its part of the tile (rows, or columns
//     when BM is 64) by wgmma, adds bias and rounds; each warp stores 16 x 64 at a time by TMA,
//     two in flight.
//   a cluster of 2 tiles that are neighbours along m (n): each CTA loads half of the W (x) slab for
//     both. Both always run the same steps; tiles beyond the edge are filled and clipped.
//
// Takes: any m, k >= 1, n a multiple of 8, any rank; pitches in multiples of 8 elements. W and L
// are k-contiguous (kMnMajor = false) or n-contiguous (true: nothing is transposed in memory, the
// tensor cores read the other way).
//
// Shared memory: kStages x (BM + BN) x 128 bytes of ring, 8 x 2 slabs of 2 KiB to store from, and
// 16 bytes of mbarriers a stage. 128 x 256: 4 x 48 + 32 = 224 KiB.
#pragma once

#include "gemm/sm90_consumer.cuh"
#include "gemm/sm90_producer.cuh"

namespace fastlora::sm90 {

// Barriers of the ring, by the whole CTA. `more` by one thread: further barriers of the kernel.
template <class Tile, class More>
__device__ __forceinline__ void start_ring(uint32_t base, int cluster, const GemmMaps& maps,
                                           More more) {
  if (threadIdx.x == 0) {
#ifdef FASTLORA_SPIN_LIMIT
    if (base % 1024 != 0) __trap();
#endif
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      const Ring<Tile> ring{base, stage};
      mbarrier_init(ring.full(), 1);
      mbarrier_init(ring.empty(), kConsumerWarps * cluster);
    }
    more();
    fence_mbarrier_init();
    for (const CUtensorMap* map : {&maps.x, &maps.w, &maps.h, &maps.l, &maps.y}) {
      prefetch_tensor_map(map);
    }
  }
  __syncthreads();
  if (cluster > 1) cluster_sync();  // no load may arrive before the barriers are there
}

// The other CTA may still arrive at barriers of this one: its shared memory must not go away.
__device__ __forceinline__ void end_together(int cluster) {
  __syncwarp();
  if (cluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

template <class T, class Tile, bool kMnMajor, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ GemmArgs args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // tells the compiler: uniform
  const int lane = threadIdx.x % 32;
  const int cluster = args.cluster_m * args.cluster_n;
  const int cta = cluster == 1 ? 0 : cluster_rank();
  start_ring<Tile>(base, cluster, maps, [] {});

  const int first = blockIdx.x / cluster, stride = gridDim.x / cluster;
  if (warp < 4) {
    registers_decrease<kProducerRegisters>();
    if (warp == 0 && lane == 0) {
      produce<Tile, kMnMajor, kMasked>(maps, args, base, cta, first, stride);
    }
  } else {
    registers_increase<kConsumerRegisters>();
    Consumer<T, Tile, kMnMajor, kMasked> consumer(maps, args, base, warp - 4, lane);
    consumer.run(cta, first, stride);
  }
  end_together(cluster);
}

}  // namespace fastlora::sm90
