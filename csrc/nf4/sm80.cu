// The launches of csrc/nf4/sm80_few.cuh, a linear of few rows over a 4-bit weight, and of
// csrc/nf4/sm80_ranks.cuh, which makes h in front of it.
#include <algorithm>

#include "host/check.h"
#include "host/dependent_launch.cuh"
#include "nf4/sm80_few.cuh"
#include "nf4/sm80_ranks.cuh"

namespace fastlora {
namespace {

constexpr int kFewRankCtas = 4;  // that make h of up to 16 rows, beside those of the linear

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether the code that runs was compiled for 9.0 or later: PTX of 8.0 may run there as well.
template <class Kernel>
bool is_for_hopper(Kernel* kernel) {
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  return code.ptxVersion >= 90;
}

template <class T, class Tile>
void launch(const Nf4Linear& p, int most_shared, CUstream_st* stream) {
  auto* const kernel =
      p.scales.absmax == nullptr ? few_kernel<T, Tile, true> : few_kernel<T, Tile, false>;
  const bool early = p.a != nullptr && is_for_hopper(kernel);  // while h is being made
  const int64_t all = ceil_div(p.n, kFewGroup), tiles = ceil_div(p.m, Tile::kRows);
  const int64_t ctas =
      std::max<int64_t>(1, (current_multiprocessors() - (early ? kFewRankCtas : 0)) / tiles);
  const int64_t groups = ceil_div(all, ctas);
  const int64_t passes =
      ceil_div(groups * kFewGroup * Tile::kTiles * few_rows_kept(p.m), Tile::kMostSums);
  // Scales of as many groups as there is room for: all, or those of some passes, or a shorter pass.
  const int64_t group_scales =
      kFewGroup * 4 * few_scale_pitch(static_cast<int>(p.k >> p.block_shift));
  const int64_t room = (most_shared - Tile::kScales) / group_scales;
  check(room >= 1, "nf4_sm80: takes up to ",
        ((most_shared - Tile::kScales) / (kFewGroup * 4) - 1) | 1, " blocks in a row here, got ",
        p.k >> p.block_shift);
  const int64_t pass_groups = std::min(ceil_div(groups, passes), room);
  const int64_t held = std::min(groups, room / pass_groups * pass_groups);
  const auto bytes = static_cast<int>(Tile::kScales + held * group_scales);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
             "nf4_sm80");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(all, groups)), static_cast<unsigned>(tiles));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;  // it waits there
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, code_book<T>(p.fp4), static_cast<int>(groups),
                                static_cast<int>(pass_groups), static_cast<int>(held)),
             "nf4_sm80");
}

}  // namespace

void nf4_ranks_sm80(const Nf4Linear& p, CUstream_st* stream) {
  const auto launch = [&](auto* kernel, int rows) {
    // A block or two of 64 k to a warp. Up to 256 rows by few CTAs, for the kernel behind takes all
    // the SMs that it finds, and needs h late; more rows would keep few CTAs too long.
    const int ctas = p.m <= 16 ? kFewRankCtas : p.m <= 256 ? 16 : 128;
    const auto most = static_cast<int>(ceil_div(p.k / kNf4BlockK, kRankWarps));
    const auto tiles = static_cast<int>(ceil_div(p.m, rows));
    const int splits = is_for_hopper(kernel) ? std::max(1, std::min({8, most, ctas / tiles})) : 1;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = splits;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(tiles * splits);
    config.blockDim = dim3(kRankWarps * 32);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = splits > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, p, splits), "nf4: h");
  };
  const auto of_types = [&](auto zero, auto factor) {
    using T = decltype(zero);
    using A = decltype(factor);
    if (p.m <= 8) return launch(ranks_kernel<T, A, 1>, 8);
    if (p.m <= 64) return launch(ranks_kernel<T, A, 2>, 16);
    launch(ranks_kernel<T, A, 4>, 32);
  };
  const auto of_type = [&](auto zero) { p.a_float ? of_types(zero, 0.0f) : of_types(zero, zero); };
  p.half ? of_type(__half{}) : of_type(__nv_bfloat16{});
}

void nf4_linear_sm80(const Nf4Linear& p, int shared_bytes, CUstream_st* stream) {
  if (p.rank > 0 && p.a != nullptr) nf4_ranks_sm80(p, stream);
  const int there = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int most = shared_bytes > 0 ? std::min(shared_bytes, there) : there;
  const auto of_rows = [&](auto zero, auto rows) {
    using T = decltype(zero);
    constexpr int kRows = decltype(rows)::value;
    // 16 warps and entries of 256 bytes where there is room: an SM of 9.0 and 10.0.
    using Large = FewTile<16, kRows, 8, kRows == 8 ? 3 : 4>;
    using Small = FewTile<8, kRows, 7, 2>;
    constexpr int kLargeBytes = Large::kScales + 32 * 1024;
    static_assert(kLargeBytes <= kMostSharedBytes && Small::kScales + 16 * 1024 <= 99 * 1024);
    most >= kLargeBytes ? launch<T, Large>(p, most, stream) : launch<T, Small>(p, most, stream);
  };
  const auto of_type = [&](auto zero) {
    if (p.m <= 8) return of_rows(zero, std::integral_constant<int, 8>{});
    of_rows(zero, std::integral_constant<int, 16>{});
  };
  p.half ? of_type(__half{}) : of_type(__nv_bfloat16{});
}

}  // namespace fastlora
