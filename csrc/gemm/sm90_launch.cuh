// How the Hopper GEMM is launched, for every kernel that is one (sm90.cu, csrc/lora/sm90.cu):
// checks, tensor maps, arguments and the grid.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "common/index.cuh"
#include "gemm/gemm.h"
#include "gemm/sm90_shape.cuh"
#include "host/check.h"
#include "host/dependent_launch.cuh"
#include "host/launch.cuh"
#include "host/tensor_map.h"

namespace fastlora::sm90 {

constexpr int64_t kMostSize = (int64_t{1} << 31) - 1024;  // tile edges stay below 2^31

inline void check_matrix(const char* name, const void* data, int64_t pitch, int64_t cols) {
  check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0, "gemm_sm90: ", name,
        " must start at a multiple of 16 bytes");
  check(pitch % 8 == 0 && pitch >= cols, "gemm_sm90: the pitch of ", name,
        " must be a multiple of 8 and at least ", cols, ", got ", pitch);
}

inline void check_gemm(const GemmParams& p, const GemmConfig& c) {
  for (const int64_t size : {p.m, p.n, p.k}) {
    check(size >= 1 && size <= kMostSize, "gemm_sm90: sizes must be in 1..", kMostSize, ", got ",
          size);
  }
  check(p.rank >= 0 && p.rank <= 4096, "gemm_sm90: rank must be in 0..4096, got ", p.rank);
  // TMA clips stores in pieces of 16 bytes: with another n it writes zeros into the next ones.
  check(p.n % 8 == 0, "gemm_sm90: n must be a multiple of 8, got ", p.n);
  check_matrix("x", p.x, p.x_pitch, p.k);
  check_matrix("w", p.w, p.w_pitch, p.w_mn_major ? p.n : p.k);
  check_matrix("y", p.y, p.y_pitch, p.n);
  if (p.rank > 0) {
    check_matrix("h", p.h, p.h_pitch, p.rank);
    check_matrix("l", p.l, p.l_pitch, p.w_mn_major ? p.n : p.rank);
  }
  check(reinterpret_cast<uintptr_t>(p.bias) % 4 == 0,
        "gemm_sm90: bias must start at a multiple of 4 bytes");
  check(p.mask == nullptr || p.mask_pitch >= ceil_div(p.n, 8), "gemm_sm90: the mask needs ",
        ceil_div(p.n, 8), " words a row, got ", p.mask_pitch);
  check((c.cluster_m == 1 || c.cluster_m == 2) && (c.cluster_n == 1 || c.cluster_n == 2) &&
            c.cluster_m * c.cluster_n <= 2,
        "gemm_sm90: (cluster_m, cluster_n) must be (1, 1), (2, 1) or (1, 2)");
  check(c.group_m >= 1 && c.num_sms >= c.cluster_m * c.cluster_n,
        "gemm_sm90: group_m and num_sms must be positive");
}

// h and L in boxes rank_depth deep.
inline GemmMaps encode_maps(const GemmParams& p, const GemmConfig& c, int rank_depth = kBlockK) {
  const ElementType type = p.half ? ElementType::kFloat16 : ElementType::kBfloat16;
  const auto swizzle = [](int depth) { return depth == 16 ? Swizzle::k32 : Swizzle::k128; };
  // A cluster that shares an operand loads it in halves.
  const auto left = [&](const void* data, int64_t cols, int64_t pitch, int depth) {
    return tensor_map_2d(data, type, p.m, cols, pitch, c.block_m / c.cluster_n, depth,
                         swizzle(depth));
  };
  const auto right = [&](const void* data, int64_t rows, int64_t pitch, int depth) {
    return p.w_mn_major ? tensor_map_2d(data, type, rows, p.n, pitch, depth, 64)
                        : tensor_map_2d(data, type, p.n, rows, pitch, c.block_n / c.cluster_m,
                                        depth, swizzle(depth));
  };
  GemmMaps maps;
  maps.x = left(p.x, p.k, p.x_pitch, kBlockK);
  maps.w = right(p.w, p.k, p.w_pitch, kBlockK);
  maps.h = p.rank > 0 ? left(p.h, p.rank, p.h_pitch, rank_depth) : maps.x;
  maps.l = p.rank > 0 ? right(p.l, p.rank, p.l_pitch, rank_depth) : maps.w;
  maps.y = tensor_map_2d(p.y, type, p.m, p.n, p.y_pitch, 16, 64);
  return maps;
}

inline GemmArgs make_args(const GemmParams& p, const GemmConfig& c) {
  const int64_t tiles_m = ceil_div(p.m, int64_t{c.block_m} * c.cluster_m);
  const int64_t tiles_n = ceil_div(p.n, int64_t{c.block_n} * c.cluster_n);
  check(tiles_m * tiles_n < std::numeric_limits<int32_t>::max() / 2, "gemm_sm90: too many tiles");
  GemmArgs args{};
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.rank = static_cast<int>(p.rank);
  args.k_steps = static_cast<int>(ceil_div(p.k, kBlockK));
  args.rank_steps = static_cast<int>(ceil_div(p.rank, kBlockK));
  args.cluster_m = c.cluster_m;
  args.cluster_n = c.cluster_n;
  args.tiles_m = static_cast<int>(tiles_m);
  args.tiles_n = static_cast<int>(tiles_n);
  args.group_m = std::min(std::max(1, c.group_m / c.cluster_m), args.tiles_m);
  args.bias = p.bias;
  args.mask = p.mask;
  args.mask_pitch = p.mask_pitch;
  return args;
}

// Clusters of this kernel that the current device can hold at once: a cluster needs its SMs in one
// GPC, so it may be fewer than the SMs suggest, and a persistent grid must not exceed it.
template <class Kernel>
int resident_clusters(Kernel* kernel, cudaLaunchConfig_t setup, int cluster,
                      std::array<std::atomic<int>, 128>& known) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "gemm_sm90");
  std::atomic<int>& entry = known[(device * 2 + cluster - 1) % known.size()];
  if (entry.load() == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(setup.dynamicSmemBytes)),
               "gemm_sm90");
    setup.gridDim = cluster;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &setup), "gemm_sm90");
    check(clusters > 0, "gemm_sm90: the kernel does not fit on this device");
    entry.store(clusters);
  }
  return entry.load();
}

// Launches a persistent kernel on as many clusters as there are `items` for, and at most as many as
// run at once.
template <class... Args>
void launch_persistent(void (*kernel)(Args...), int shared_bytes,
                       std::array<std::atomic<int>, 128>& known, int items,
                       const GemmConfig& config, CUstream_st* stream, const Args&... args) {
  const int cluster = config.cluster_m * config.cluster_n;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t setup{};
  setup.blockDim = kThreads;
  setup.dynamicSmemBytes = shared_bytes;
  setup.stream = stream;
  setup.attrs = &attribute;
  setup.numAttrs = 1;

  const int clusters =
      std::min({items, config.num_sms / cluster, resident_clusters(kernel, setup, cluster, known)});
  setup.gridDim = clusters * cluster;
  check_cuda(cudaLaunchKernelEx(&setup, kernel, args...), "gemm_sm90");
  check_launch("gemm_sm90");
}

}  // namespace fastlora::sm90
