// The launch of csrc/nf4/sm90_kernel.cuh: which tile, how many parts of k.
#include <algorithm>
#include <array>
#include <atomic>

#include "common/index.cuh"
#include "host/check.h"
#include "host/dependent_launch.cuh"
#include "host/tensor_map.h"
#include "nf4/linear.h"
#include "nf4/sm90_kernel.cuh"

namespace fastlora {
namespace {

using sm90::kNf4Columns;
using sm90::kNf4MostSplits;

// Clusters of `ctas` CTAs that the current device holds at once.
template <class Tile, class Kernel>
int resident_clusters(Kernel* kernel, cudaLaunchConfig_t setup, int ctas) {
  static std::array<std::atomic<int>, 64 * 16> known{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "nf4_sm90");
  std::atomic<int>& entry = known[(device * 16 + ctas) % known.size()];
  if (entry.load() == 0) {
    setup.gridDim = ctas;
    setup.attrs[0].val.clusterDim.x = ctas;
    setup.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &setup), "nf4_sm90");
    entry.store(clusters + 1);  // 0: not asked yet
  }
  return entry.load() - 1;
}

template <class T, bool kBack, int kRows>
void launch(const Nf4Linear& p, int splits, CUstream_st* stream) {
  using Tile = sm90::Nf4Tile<kRows, kBack>;
  auto* const kernel = sm90::nf4_kernel<T, Tile>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes),
      "nf4_sm90");
  sm90::Nf4Args args{};
  args.m = static_cast<int>(p.m);
  args.n = static_cast<int>(p.n);
  args.columns = static_cast<int>(kBack ? p.k : p.n);
  args.rank = static_cast<int>(p.rank);
  args.steps = static_cast<int>(ceil_div(kBack ? p.n : p.k, int64_t{kNf4BlockK}));
  args.tiles_m = static_cast<int>(ceil_div(p.m, kRows));
  args.scales = p.scales;
  args.block_shift = p.block_shift;
  args.blocks = static_cast<int>(p.k >> p.block_shift);
  args.book = code_book<T>(p.fp4);
  args.factor = kBack ? p.a : p.b;
  args.factor_float = kBack ? p.a_float : p.b_float;
  args.bias = p.bias;
  args.h = p.h;
  args.y = p.y;

  const bool makes_h = !kBack && p.a != nullptr;
  const int64_t tiles = args.tiles_m * ceil_div(args.columns, kNf4Columns);

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t setup{};
  setup.blockDim = sm90::kNf4Threads;
  setup.dynamicSmemBytes = Tile::kBytes;
  setup.stream = stream;
  setup.attrs = attributes;
  if (splits == 0) {  // as many as all run at once with, of eight steps or more
    // Some clusters find SMs that are still busy with h.
    const int late = makes_h && p.m <= 256 ? 4 : 0;
    splits = kNf4MostSplits;
    while (splits > 1 && (args.steps < 8 * splits ||
                          tiles + late > resident_clusters<Tile>(kernel, setup, splits))) {
      --splits;
    }
  }
  check(splits <= std::min(args.steps, kNf4MostSplits) && tiles * splits < (int64_t{1} << 31),
        "nf4_sm90: takes up to ", std::min(args.steps, kNf4MostSplits),
        " parts of the sums here, got ", splits);
  args.splits = splits;

  sm90::Nf4Maps maps;
  const ElementType type = p.half ? ElementType::kFloat16 : ElementType::kBfloat16;
  maps.x = tensor_map_2d(p.x, type, p.m, kBack ? p.n : p.k, p.x_pitch, kRows, kNf4BlockK);
  maps.codes = tensor_map_2d(
      p.codes, ElementType::kByte, p.n, p.k / 2, p.k / 2, kBack ? kNf4BlockK : kNf4Columns,
      (kBack ? kNf4Columns : kNf4BlockK) / 2, kBack ? Swizzle::k64 : Swizzle::k32);
  setup.gridDim = static_cast<unsigned>(tiles * splits);
  attributes[0].val.clusterDim.x = splits;
  setup.numAttrs = makes_h ? 2 : 1;  // while h is being made
  check_cuda(cudaLaunchKernelEx(&setup, kernel, maps, args), "nf4_sm90");
}

template <class T, bool kBack>
void launch(const Nf4Linear& p, const Nf4Config& config, CUstream_st* stream) {
  int rows = config.rows;
  if (rows == 0) {
    for (rows = 16; rows < p.m && rows < 256;) rows *= 2;
  }
  check(
      (rows == 16 || rows == 32 || rows == 64 || rows == 128 || rows == 256) && config.splits >= 0,
      "nf4_sm90: rows of a tile must be 16, 32, 64, 128 or 256 and splits 1 or more, got ", rows,
      " and ", config.splits);
  switch (rows) {
    case 16:
      return launch<T, kBack, 16>(p, config.splits, stream);
    case 32:
      return launch<T, kBack, 32>(p, config.splits, stream);
    case 64:
      return launch<T, kBack, 64>(p, config.splits, stream);
    case 128:
      return launch<T, kBack, 128>(p, config.splits, stream);
    default:
      return launch<T, kBack, 256>(p, config.splits, stream);
  }
}

}  // namespace

void nf4_linear_sm90(const Nf4Linear& p, const Nf4Config& config, CUstream_st* stream) {
  const void* scales =
      p.scales.absmax == nullptr ? static_cast<const void*>(p.scales.codes) : p.scales.absmax;
  check((p.k >> p.block_shift) % 4 == 0 &&
            (p.scales.absmax != nullptr || p.scales.nested_shift >= 2) &&
            reinterpret_cast<uintptr_t>(scales) % (p.scales.absmax == nullptr ? 4 : 16) == 0,
        "nf4_sm90: takes scales by four: rows of 4, 8, ... blocks, quantised scales in blocks of 4 "
        "or more, and a start at a multiple of four of them");
  if (p.rank > 0 && p.a != nullptr) nf4_ranks_sm80(p, stream);
  if (p.half) return launch<__half, false>(p, config, stream);
  launch<__nv_bfloat16, false>(p, config, stream);
}

void nf4_dx_sm90(const Nf4Linear& p, const Nf4Config& config, CUstream_st* stream) {
  if (p.half) return launch<__half, true>(p, config, stream);
  launch<__nv_bfloat16, true>(p, config, stream);
}

}  // namespace fastlora
