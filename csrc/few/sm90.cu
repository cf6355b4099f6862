// Launches the kernel of sm90_kernel.cuh.
#include <algorithm>
#include <array>
#include <atomic>
#include <type_traits>

#include "common/index.cuh"
#include "few/few.h"
#include "few/sm90_kernel.cuh"
#include "host/check.h"
#include "host/dependent_launch.cuh"
#include "host/launch.cuh"
#include "host/tensor_map.h"

namespace fastlora {
namespace {

using sm90::FewArgs;
using sm90::FewMaps;

constexpr int kShared = 227 * 1024, kHalfShared = 113 * 1024;  // of an SM: for one CTA, for two
constexpr int kMostStages = 8;                                 // more in flight is no faster
constexpr int64_t kMostSize = (int64_t{1} << 31) - 1024;

bool is_one_of(int value, std::initializer_list<int> accepted) {
  return std::find(accepted.begin(), accepted.end(), value) != accepted.end();
}

void check_few(const FewParams& p, const FewConfig& c) {
  for (const int64_t size : {p.m, p.n, p.k}) {
    check(size >= 1 && size <= kMostSize, "few_sm90: sizes must be in 1..", kMostSize, ", got ",
          size);
  }
  check(p.n % 8 == 0 && p.k % 8 == 0 && p.rank % 8 == 0 && p.rank >= 8 && p.rank <= 64,
        "few_sm90: n, k and rank (8 to 64) must be multiples of 8, got ", p.n, ", ", p.k, ", ",
        p.rank);
  const auto aligned = [](const char* name, const void* data, int64_t pitch, int64_t columns,
                          bool is_float) {
    check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              pitch % (is_float ? 4 : 8) == 0 && pitch >= columns,
          "few_sm90: ", name, " must start at, and have rows apart by, multiples of 16 bytes");
  };
  aligned("x", p.x, p.x_pitch, p.k, false);
  aligned("w", p.w, p.w_pitch, p.w_mn_major ? p.n : p.k, false);
  aligned("a", p.a, p.a_pitch, p.w_mn_major ? p.rank : p.k, p.a_float);
  aligned("b", p.b, p.b_pitch, p.w_mn_major ? p.n : p.rank, p.b_float);
  aligned("y", p.y, p.n, p.n, false);
  aligned("h", p.h, p.rank, p.rank, false);
  check(is_one_of(c.columns, {64, 128}), "few_sm90: columns must be 64 or 128, got ", c.columns);
  check(is_one_of(c.cluster_m, {1, 2, 4}) && is_one_of(c.splits, {1, 2, 4, 8}) &&
            c.cluster_m * c.splits <= 8,
        "few_sm90: cluster_m must be 1, 2 or 4, splits 1, 2, 4 or 8, their product at most 8, got ",
        c.cluster_m, " and ", c.splits);
  check(c.splits <= ceil_div(p.k, sm90::kFewDepth), "few_sm90: k = ", p.k,
        " is too little for splits = ", c.splits);
}

FewMaps encode_maps(const FewParams& p, const FewConfig& c, int kn, int x_rows) {
  const ElementType type = p.half ? ElementType::kFloat16 : ElementType::kBfloat16;
  const int a_rows = std::max(8, kn / c.cluster_m);
  FewMaps maps;
  maps.x = tensor_map_2d(p.x, type, p.m, p.k, p.x_pitch, x_rows, sm90::kFewDepth);
  const ElementType a_type = p.a_float ? ElementType::kFloat32 : type;
  const int a_columns = p.a_float ? 32 : sm90::kFewDepth;
  if (p.w_mn_major) {
    const int k_rows = sm90::kFewDepth / c.cluster_m;
    maps.w = tensor_map_2d(p.w, type, p.k, p.n, p.w_pitch, k_rows, 64);
    maps.a = tensor_map_2d(p.a, a_type, p.k, p.rank, p.a_pitch, k_rows, a_columns);
    return maps;
  }
  maps.w = tensor_map_2d(p.w, type, p.n, p.k, p.w_pitch, c.columns / c.cluster_m, sm90::kFewDepth);
  maps.a = tensor_map_2d(p.a, a_type, p.rank, p.k, p.a_pitch, a_rows, a_columns);
  return maps;
}

// Clusters that run at once with all of an SM's shared memory for each CTA.
template <class Kernel>
int resident_clusters(Kernel* kernel, cudaLaunchConfig_t setup, int cluster,
                      std::array<std::atomic<int>, 256>& known) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "few_sm90");
  std::atomic<int>& entry = known[(device * 8 + cluster - 1) % known.size()];
  if (entry.load() == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
               "few_sm90");
    setup.gridDim = cluster;
    setup.dynamicSmemBytes = kShared;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &setup), "few_sm90");
    entry.store(std::max(1, clusters));
  }
  return entry.load();
}

template <class T, class Shape>
void launch(const FewParams& p, const FewConfig& c, CUstream_st* stream) {
  const int tiles_m = static_cast<int>(ceil_div(p.m, sm90::kFewRows));
  const int x_rows = static_cast<int>(std::min<int64_t>(sm90::kFewRows, ceil_div(p.m, 8) * 8));
  FewArgs args{};
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.rank = static_cast<int>(p.rank);
  args.k_steps = static_cast<int>(ceil_div(p.k, sm90::kFewDepth));
  args.cluster_m = c.cluster_m;
  args.splits = c.splits;
  args.tiles_n = static_cast<int>(ceil_div(p.n, Shape::kC));
  args.x_bytes = x_rows * 128;
  args.b = p.b;
  args.b_pitch = p.b_pitch;
  args.b_float = p.b_float;
  args.bias = p.bias;
  args.scale = p.scale;
  args.scaling = p.scaling;
  args.y = p.y;
  args.h = p.h;

  const int cluster = c.cluster_m * c.splits;
  const int64_t clusters = ceil_div(tiles_m, c.cluster_m) * args.tiles_n;
  check(clusters * cluster < (int64_t{1} << 31), "few_sm90: too many tiles");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t setup{};
  setup.gridDim = static_cast<unsigned>(clusters * cluster);
  setup.blockDim = sm90::kFewThreads;
  setup.stream = stream;
  setup.attrs = &attribute;
  setup.numAttrs = 1;

  // One CTA an SM, with twice the ring, where all of them run at once so; else two.
  static std::array<std::atomic<int>, 256> known{};
  auto* const kernel = sm90::few_kernel<T, Shape>;
  const bool alone = clusters <= resident_clusters(kernel, setup, cluster, known);
  args.stages = kMostStages;
  while (Shape::shared_bytes(args.x_bytes, args.stages) > (alone ? kShared : kHalfShared)) {
    --args.stages;
  }
  setup.dynamicSmemBytes = Shape::shared_bytes(args.x_bytes, args.stages);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
             "few_sm90");
  check_cuda(cudaLaunchKernelEx(&setup, kernel, encode_maps(p, c, Shape::kN, x_rows), args),
             "few_sm90");
  check_launch("few_sm90");
}

template <class T, int kColumns, bool kMn>
void launch(const FewParams& p, const FewConfig& c, CUstream_st* stream) {
  if (p.rank <= 16) {
    return p.a_float ? launch<T, sm90::FewShape<kColumns, 16, true, kMn>>(p, c, stream)
                     : launch<T, sm90::FewShape<kColumns, 16, false, kMn>>(p, c, stream);
  }
  return p.a_float ? launch<T, sm90::FewShape<kColumns, 64, true, kMn>>(p, c, stream)
                   : launch<T, sm90::FewShape<kColumns, 64, false, kMn>>(p, c, stream);
}

template <class T>
void launch(const FewParams& p, const FewConfig& c, CUstream_st* stream) {
  if (c.columns == 64) {
    return p.w_mn_major ? launch<T, 64, true>(p, c, stream) : launch<T, 64, false>(p, c, stream);
  }
  return p.w_mn_major ? launch<T, 128, true>(p, c, stream) : launch<T, 128, false>(p, c, stream);
}

}  // namespace

void few_sm90(const FewParams& params, const FewConfig& config, CUstream_st* stream) {
  check_few(params, config);
  if (params.half) return launch<__half>(params, config, stream);
  launch<__nv_bfloat16>(params, config, stream);
}

}  // namespace fastlora
