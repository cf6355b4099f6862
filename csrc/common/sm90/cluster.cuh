// Threads among themselves: clusters, named barriers, and the registers a warpgroup may use.
#pragma once

#include <cstdint>

namespace fastlora::sm90 {

// This CTA's place in its cluster: 0 without one.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Where CTA `cta` of the cluster has what is at this shared address here.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, uint32_t cta) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(cta));
  return address;
}

// A barrier of all threads of the cluster, in two halves. Whole warps must execute it.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Before a CTA whose shared memory others have read ends, or uses it again. What was read has
// arrived, for it was used: nothing has to be made visible, which would take a microsecond.
__device__ __forceinline__ void cluster_sync_readers() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  cluster_wait();
}

// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads of the CTA, whole warps.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same, and whether `value` holds for all of them: the same answer everywhere.
__device__ __forceinline__ bool named_barrier_all(int id, int threads, bool value) {
  int all;
  asm volatile(
      "{\n"
      ".reg .pred mine, every;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "bar.red.and.pred every, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, every;\n"
      "}\n"
      : "=r"(all)
      : "r"(id), "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return all != 0;
}

// Registers a thread, by all warps of a warpgroup. A kernel starts with what its launch bounds
// give; an increase waits until others have given up enough. Multiples of 8 in 24..256.
template <int Registers>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace fastlora::sm90
