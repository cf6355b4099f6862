// Launches the Hopper GEMM of sm90_kernel.cuh: which instance to run.
#include "gemm/sm90_kernel.cuh"
#include "gemm/sm90_launch.cuh"

// Tiles of y that there are kernels for. A build of a subset helps while tuning.
#ifndef FASTLORA_GEMM_TILES
#define FASTLORA_GEMM_TILES(each) \
  each(128, 256) each(256, 128) each(128, 192) each(128, 128) each(64, 256) each(64, 128)
#endif

namespace fastlora {
namespace {

using sm90::GemmArgs;
using sm90::GemmMaps;

template <class T, class Tile, bool kMnMajor, bool kMasked>
void launch(const GemmMaps& maps, const GemmArgs& args, const GemmConfig& config,
            CUstream_st* stream) {
  static std::array<std::atomic<int>, 128> known{};
  sm90::launch_persistent(sm90::gemm_kernel<T, Tile, kMnMajor, kMasked>, Tile::kSharedBytes, known,
                          args.tiles_m * args.tiles_n, config, stream, maps, args);
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

int multiprocessors(int device) { return multiprocessors_of(device); }

void gemm_sm90(const GemmParams& params, const GemmConfig& config, CUstream_st* stream) {
  sm90::check_gemm(params, config);
#define FASTLORA_TRY_TILE(rows, cols)                                                 \
  if (config.block_m == rows && config.block_n == cols) {                             \
    using Tile = sm90::Tile<rows, cols>;                                              \
    const GemmMaps maps = sm90::encode_maps(params, config);                          \
    const GemmArgs args = sm90::make_args(params, config);                            \
    if (params.half) return launch<__half, Tile>(maps, args, params, config, stream); \
    return launch<__nv_bfloat16, Tile>(maps, args, params, config, stream);           \
  }
  FASTLORA_GEMM_TILES(FASTLORA_TRY_TILE)
#undef FASTLORA_TRY_TILE
  check(false, "gemm_sm90: no kernel has the tile ", config.block_m, "x", config.block_n);
}

}  // namespace fastlora
