// Launches the Hopper GEMM of sm90_kernel.cuh: checks, tensor maps, and which instance to run.
#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "common/index.cuh"
#include "gemm/gemm.h"
#include "gemm/sm90_kernel.cuh"
#include "host/check.h"
#include "host/launch.cuh"
#include "host/tensor_map.h"

// Tiles of y that there are kernels for. A build of a subset helps while tuning.
#ifndef FASTLORA_GEMM_TILES
#define FASTLORA_GEMM_TILES(each) \
  each(128, 256) each(256, 128) each(128, 192) each(128, 128) each(64, 256) each(64, 128)
#endif

namespace fastlora {
namespace {

using sm90::GemmArgs;
using sm90::GemmMaps;
using sm90::kBlockK;

constexpr int64_t kMostSize = (int64_t{1} << 31) - 1024;  // tile edges stay below 2^31

void check_matrix(const char* name, const void* data, int64_t pitch, int64_t cols) {
  check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0, "gemm_sm90: ", name,
        " must start at a multiple of 16 bytes");
  check(pitch % 8 == 0 && pitch >= cols, "gemm_sm90: the pitch of ", name,
        " must be a multiple of 8 and at least ", cols, ", got ", pitch);
}

void check_all(const GemmParams& p, const GemmConfig& c) {
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

// A cache by pointers and shapes would go here.
GemmMaps encode_maps(const GemmParams& p, const GemmConfig& c) {
  const ElementType type = p.half ? ElementType::kFloat16 : ElementType::kBfloat16;
  // A cluster that shares an operand loads it in halves.
  const auto left = [&](const void* data, int64_t cols, int64_t pitch) {
    return tensor_map_2d(data, type, p.m, cols, pitch, c.block_m / c.cluster_n, kBlockK);
  };
  const auto right = [&](const void* data, int64_t depth, int64_t pitch) {
    return p.w_mn_major
               ? tensor_map_2d(data, type, depth, p.n, pitch, kBlockK, 64)
               : tensor_map_2d(data, type, p.n, depth, pitch, c.block_n / c.cluster_m, kBlockK);
  };
  GemmMaps maps;
  maps.x = left(p.x, p.k, p.x_pitch);
  maps.w = right(p.w, p.k, p.w_pitch);
  maps.h = p.rank > 0 ? left(p.h, p.rank, p.h_pitch) : maps.x;
  maps.l = p.rank > 0 ? right(p.l, p.rank, p.l_pitch) : maps.w;
  maps.y = tensor_map_2d(p.y, type, p.m, p.n, p.y_pitch, 16, 64);
  return maps;
}

GemmArgs make_args(const GemmParams& p, const GemmConfig& c) {
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
  args.deferred_wait = c.pdl == Pdl::kDeferred && p.rank > 0 && p.mask == nullptr;
  return args;
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastlora: gemm_sm90: ") + cudaGetErrorString(error));
}

// Clusters of this kernel that the current device can hold at once: a cluster needs its SMs in one
// GPC, so it may be fewer than the SMs suggest, and a persistent grid must not exceed it.
template <class Kernel>
int resident_clusters(Kernel* kernel, cudaLaunchConfig_t setup, int cluster,
                      std::array<std::atomic<int>, 128>& known) {
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  std::atomic<int>& entry = known[(device * 2 + cluster - 1) % known.size()];
  if (entry.load() == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(setup.dynamicSmemBytes)));
    setup.gridDim = cluster;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &setup));
    check(clusters > 0, "gemm_sm90: the kernel does not fit on this device");
    entry.store(clusters);
  }
  return entry.load();
}

template <class T, class Tile, bool kMnMajor, bool kMasked>
void launch(const GemmMaps& maps, const GemmArgs& args, const GemmConfig& config,
            CUstream_st* stream) {
  static std::array<std::atomic<int>, 128> known{};
  auto* const kernel = sm90::gemm_kernel<T, Tile, kMnMajor, kMasked>;
  const int cluster = args.cluster_m * args.cluster_n;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t setup{};
  setup.blockDim = sm90::kThreads;
  setup.dynamicSmemBytes = Tile::kSharedBytes;
  setup.stream = stream;
  setup.attrs = attributes;
  setup.numAttrs = 1;

  const int clusters = std::min({args.tiles_m * args.tiles_n, config.num_sms / cluster,
                                 resident_clusters(kernel, setup, cluster, known)});
  setup.gridDim = clusters * cluster;
  setup.numAttrs = config.pdl == Pdl::kOff ? 1 : 2;
  check_cuda(cudaLaunchKernelEx(&setup, kernel, maps, args));
  check_launch("gemm_sm90");
}

template <class T, class Tile>
void launch(const GemmMaps& maps, const GemmArgs& args, const GemmParams& params,
            const GemmConfig& config, CUstream_st* stream) {
  const bool masked = params.mask != nullptr && params.rank > 0;
  const auto instance =
      params.w_mn_major ? (masked ? launch<T, Tile, true, true> : launch<T, Tile, true, false>)
                        : (masked ? launch<T, Tile, false, true> : launch<T, Tile, false, false>);
  instance(maps, args, config, stream);
}

}  // namespace

int multiprocessors(int device) {
  static std::array<std::atomic<int>, 64> known{};
  std::atomic<int>& entry = known[device % known.size()];
  if (entry.load() == 0) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    entry.store(count);
  }
  return entry.load();
}

void gemm_sm90(const GemmParams& params, const GemmConfig& config, CUstream_st* stream) {
  check_all(params, config);
#define FASTLORA_TRY_TILE(rows, cols)                                                 \
  if (config.block_m == rows && config.block_n == cols) {                             \
    using Tile = sm90::Tile<rows, cols>;                                              \
    const GemmMaps maps = encode_maps(params, config);                                \
    const GemmArgs args = make_args(params, config);                                  \
    if (params.half) return launch<__half, Tile>(maps, args, params, config, stream); \
    return launch<__nv_bfloat16, Tile>(maps, args, params, config, stream);           \
  }
  FASTLORA_GEMM_TILES(FASTLORA_TRY_TILE)
#undef FASTLORA_TRY_TILE
  check(false, "gemm_sm90: no kernel has the tile ", config.block_m, "x", config.block_n);
}

}  // namespace fastlora
