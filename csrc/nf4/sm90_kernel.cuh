// y = x W^T + bias + h B^T, and backward dX = dY W + g A, on Hopper, W [n, k] in 4 bits, read as it
// lies and decoded on the way to the tensor cores: for up to a thousand rows of x or two, where a
// weight in floats would cost more than decoding it for every 256 of them.
//
// Tile: 128 features (rows of W) by up to 256 rows of x, y transposed: decoded elements are the
// operand that wgmma takes from registers, x the one in shared memory. 64 of k a step. Backward the
// same with 128 columns of W by rows of dY, and 64 of n a step; x, y and h are dY, dX and g below.
//
// Who does what (384 threads; one CTA an SM, or two where tiles are narrow):
//   warpgroup 0: a thread of warp 0 fills a ring with x and codes by TMA; warps 1 and 2 make the
//     scales, ahead, and put them there as pairs of the operands' type; warp 3 fetches h, when the
//     kernel in front has made it.
//   warpgroups 1, 2: 64 features each. A byte of codes is two elements; a table of all 256, for
//     every lane in a bank of its own, turns it into a register of the operand, and a product with
//     the pair of scales follows. While half a step multiplies the next half is decoded.
//     Backward ldmatrix transposes the bytes, and two entries make two registers.
//   a cluster splits the steps: sums meet in shared memory, added in the order of the parts.
//
// Row g and row g + 8 of a warp's operand are neighbouring columns of y.
#pragma once

#include "nf4/sm90_consumer.cuh"
#include "nf4/sm90_producer.cuh"

namespace fastlora::sm90 {

template <class T, class Tile>
__global__ void __launch_bounds__(kNf4Threads, Tile::kCtas)
    nf4_kernel(const __grid_constant__ Nf4Maps maps, const __grid_constant__ Nf4Args args) {
  extern __shared__ __align__(1024) char nf4_shared[];
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // tells the compiler: uniform
  const int lane = threadIdx.x % 32;
  const int part = static_cast<int>(blockIdx.x) % args.splits;
  const int tile = static_cast<int>(blockIdx.x) / args.splits;
  const Nf4Cta<Tile> cta{
      args,
      nf4_shared,
      shared_address(nf4_shared),
      int64_t{tile / args.tiles_m} * kNf4Columns,
      tile % args.tiles_m * Tile::kRows,
      static_cast<int>(int64_t{args.steps} * part / args.splits),
      static_cast<int>(int64_t{args.steps} * (part + 1) / args.splits),
      part,
      warp,
      lane,
  };
  if (threadIdx.x == 0) {
#ifdef FASTLORA_SPIN_LIMIT
    if (cta.base % 1024 != 0) __trap();
#endif
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(cta.full(stage), 1 + kScaleWarps * 32);
      mbarrier_init(cta.empty(stage), kNf4Math);
    }
    mbarrier_init(cta.h_full(), 1);
    mbarrier_init(cta.h_empty(), kNf4Math / 32);
    fence_mbarrier_init();
    prefetch_tensor_map(&maps.x);
    prefetch_tensor_map(&maps.codes);
  }
  const Nf4Producer<T, Tile> producer{cta};
  typename Nf4Producer<T, Tile>::Early early;
  if (warp == 1 || warp == 2) early = producer.ask_early();
  auto* const values = reinterpret_cast<float*>(nf4_shared + Tile::kValues);
  if (threadIdx.x >= 128 && threadIdx.x < 144) {
    values[threadIdx.x - 128] = args.book.value[threadIdx.x - 128];
  }
  __syncthreads();

  const bool update = args.rank > 0 && part == 0;
  constexpr int kBusy = Tile::kCtas == 2 ? 96 : 224;
  constexpr int kIdle = Tile::kCtas == 2 ? Tile::kBack ? 48 : 40 : 56;
  if (warp < 4) {
    registers_decrease<kIdle>();
    if (warp == 0 && lane == 0) producer.load(maps);
    if (warp == 1 || warp == 2) producer.make_scales(early);
    if (warp == 3 && update) producer.load_h();
    __syncwarp();
    if (args.splits > 1) cluster_sync();
  } else {
    registers_increase<kBusy>();
    fill_table<T, Tile::kShift>(nf4_shared + Tile::kTable, values, threadIdx.x - 128, kNf4Math);
    named_barrier_sync(1, kNf4Math);
    const Nf4Consumer<T, Tile> consumer{cta};
    float acc[Tile::kRows / 2];
    uint32_t factor[4];
    if (update) consumer.load_factor(factor, 0);
    consumer.multiply(acc);
    if (update) consumer.add_update(acc, factor);
    if (args.splits == 1) {
      consumer.store(acc);
    } else {
      consumer.put(acc);
      cluster_sync();
      consumer.store_share();
    }
    __syncwarp();
  }
  if (args.splits > 1) cluster_sync_readers();
}

}  // namespace fastlora::sm90
