// The model. Constants are of an H200 (benchmarks/NOTES.md).
#include "plan/few.h"

#include <algorithm>
#include <limits>

#include "common/index.cuh"
#include "host/check.h"

namespace fastlora {
namespace {

constexpr double kMemoryBytes = 4.2e6, kL2Bytes = 9.5e6, kSmBytes = 95e3;  // in a us
constexpr double kLatencyUs = 2;        // of a load while all memory is busy
constexpr double kClocksPerUs = 1600;   // two columns of 64 x 16 a clock
constexpr double kSharedBytes = 227e3;  // of an SM
constexpr double kClusterShare = 0.91;  // of the SMs that clusters of 4 and 8 find together

double split_us(int splits) { return splits == 1 ? 0 : 0.7 + 0.16 * splits; }

}  // namespace

double estimate(const FewWork& work, const FewConfig& config) {
  check(work.m >= 1 && work.n >= 1 && work.k >= 1 && work.rank >= 1 && work.num_sms >= 1,
        "FewWork: sizes must be positive, got m = ", work.m, ", n = ", work.n, ", k = ", work.k,
        ", rank = ", work.rank, ", num_sms = ", work.num_sms);
  const int cluster = config.cluster_m * config.splits;
  const int64_t k_steps = ceil_div(work.k, 64), tiles_m = ceil_div(work.m, 64);
  if (cluster > 8 || config.splits > k_steps) return std::numeric_limits<double>::infinity();
  const auto clusters =
      static_cast<double>(ceil_div(tiles_m, config.cluster_m) * ceil_div(work.n, config.columns));
  const int ranks = work.rank <= 16 ? 16 : 64;
  const auto x_rows = static_cast<double>(std::min<int64_t>(64, ceil_div(work.m, 8) * 8));
  const double slot = 128 * (x_rows + config.columns + ranks);
  const auto steps = static_cast<double>(ceil_div(k_steps, config.splits));

  // One CTA an SM if all are resident then, else two; and as many waves as it takes.
  const double found = work.num_sms * (cluster <= 2 ? 1 : kClusterShare) / cluster;
  const bool alone = clusters <= static_cast<int>(found);
  const auto resident = static_cast<double>(static_cast<int>(alone ? found : 2 * found));
  if (resident < 1) return std::numeric_limits<double>::infinity();
  const auto waves = static_cast<double>(static_cast<int64_t>((clusters - 1) / resident) + 1);
  const double stages =
      std::min(8., static_cast<double>(static_cast<int>(kSharedBytes / (alone ? 1 : 2) / slot)));
  const double together = std::min(clusters * cluster, resident * cluster) / work.num_sms;
  const double busy = std::max(slot / kSmBytes, 2 * (config.columns + ranks) / kClocksPerUs);
  const double step = std::max(busy * std::max(1., together), kLatencyUs / stages);

  const double from_l2 =
      128 * (x_rows + static_cast<double>(config.columns + ranks) / config.cluster_m);
  const double all_steps = clusters * cluster * steps;
  return std::max({waves * steps * step, all_steps * from_l2 / kL2Bytes,
                   2. * static_cast<double>(work.n) * static_cast<double>(work.k) / kMemoryBytes}) +
         split_us(config.splits);
}

FewConfig plan_few(const FewWork& work) {
  FewConfig best;
  double least = std::numeric_limits<double>::infinity();
  for (const int columns : {64, 128}) {  // at a tie the smaller tiles, on more SMs
    for (const int cluster_m : {1, 2, 4}) {
      if (cluster_m > 1 && cluster_m >= 2 * ceil_div(work.m, 64)) continue;  // half of it idle
      for (const int splits : {1, 2, 4, 8}) {
        const FewConfig config{columns, cluster_m, splits};
        const double us = estimate(work, config);
        if (us >= least - 0.05) continue;
        least = us;
        best = config;
      }
    }
  }
  return best;
}

}  // namespace fastlora
