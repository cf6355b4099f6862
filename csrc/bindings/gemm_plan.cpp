#include "bindings/gemm_plan.h"

#include <array>
#include <map>
#include <mutex>

namespace fastlora {

GemmConfig planned(int family, const Problem& problem, bool (*takes)(const TileConfig&),
                   const GemmConfig& otherwise) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 6>, GemmConfig> known;
  const std::array<int64_t, 6> key = {family,    problem.m,    problem.n,
                                      problem.k, problem.rank, problem.num_sms};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  GemmConfig config = otherwise;
  for (const TileConfig& tile : candidates(problem)) {
    if (!takes(tile)) continue;
    config = {tile.block_m, tile.block_n, tile.cluster_m, tile.cluster_n, tile.group_m};
    break;
  }
  if (known.size() > 4096) known.clear();
  return known[key] = config;
}

}  // namespace fastlora
