// The cost model. Constants are of an H200 (sm_90a, 132 SMs); only the order of the predictions
// matters.
#include "plan/plan.h"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "common/index.cuh"
#include "host/check.h"

namespace fastlora {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 36;  // tile counts stay far below 2^63
constexpr int kElement = 2;                     // bytes of fp16 and bf16
constexpr int kBarrierBytes = 1024;             // barriers, tile queue and bias of the tile
constexpr int kMinStages = 3;                   // fewer do not hide the latency of a load
constexpr int kMaxStages = 8;                   // more were never faster
constexpr double kL2PerSm = 64;                 // bytes / clock one SM can load from L2
constexpr double kL2Total = 6100;               // bytes / clock all SMs together can
constexpr double kDram = 2300;                  // bytes / clock of the memory
constexpr double kLaunch = 4000;                // clocks to start, fill the ring and drain
constexpr double kTile = 2500;          // clocks between the main loops of two tiles of a CTA
constexpr double kReduceLaunch = 2500;  // clocks more for a second kernel that sums the parts
constexpr std::array<int, 4> kSplits = {1, 2, 4, 8};
constexpr int64_t kMinStepsPerSplit = 8;  // a shorter K loop is all prologue

int64_t stage_bytes(int block_m, int block_n) {
  return int64_t{kElement} * kBlockK * (block_m + block_n);
}

constexpr int64_t kStaging =
    32768;  // of y, for the TMA stores: two slabs a warp, whatever the tile

int most_stages(int block_m, int block_n) {
  const int64_t ring = kSharedMemory - kStaging - kBarrierBytes;
  return static_cast<int>(std::min<int64_t>(ring / stage_bytes(block_m, block_n), kMaxStages));
}

int64_t tiles_of(const Problem& p, int block_m, int block_n) {
  return ceil_div(p.m, block_m) * ceil_div(p.n, block_n);
}

// Steps of the K loop: the base product, then the rank.
int64_t steps_of(const Problem& p) { return ceil_div(p.k, kBlockK) + ceil_div(p.rank, kBlockK); }

// Rows of tiles walked together: whichever makes one wave touch fewer bytes of x and W.
int group_for(const Problem& p, int block_m, int block_n) {
  const auto touched = [&](int64_t group) {
    return group * block_m + ceil_div(p.num_sms, group) * block_n;
  };
  return touched(8) <= touched(16) ? 8 : 16;
}

struct Ranked {
  double clocks;
  TileConfig config;
};

}  // namespace

void Problem::validate() const {
  for (const int64_t size : {m, n, k, rank}) {
    check(size >= 0 && size <= kMaxSize, "Problem: m, n, k and rank must be in 0..2^36, got ",
          size);
  }
  check(dtype == "bfloat16" || dtype == "float16",
        "Problem: dtype must be bfloat16 or float16, got ", dtype);
  check(num_sms >= 1, "Problem: num_sms must be at least 1, got ", num_sms);
}

int64_t TileConfig::shared_memory() const {
  return stages * stage_bytes(block_m, block_n) + kStaging + kBarrierBytes;
}

void TileConfig::validate() const {
  const auto known = [&](const std::array<int, 2>& tile) {
    return tile[0] == block_m && tile[1] == block_n;
  };
  check(std::any_of(kTiles.begin(), kTiles.end(), known), "TileConfig: no kernel has the tile ",
        block_m, "x", block_n);
  check(stages >= kMinStages && stages <= most_stages(block_m, block_n),
        "TileConfig: stages must be ", kMinStages, "..", most_stages(block_m, block_n),
        " for the tile ", block_m, "x", block_n, ", got ", stages);
  check((cluster_m == 1 || cluster_m == 2) && (cluster_n == 1 || cluster_n == 2) &&
            cluster_m * cluster_n <= 2,
        "TileConfig: (cluster_m, cluster_n) must be (1, 1), (2, 1) or (1, 2), got (", cluster_m,
        ", ", cluster_n, ")");
  check(std::find(kSplits.begin(), kSplits.end(), split_k) != kSplits.end(),
        "TileConfig: split_k must be 1, 2, 4 or 8, got ", split_k);
  check(group_m >= 1, "TileConfig: group_m must be at least 1, got ", group_m);
}

std::vector<int64_t> TileConfig::to_list() const {
  return {block_m, block_n, stages, cluster_m, cluster_n, split_k, group_m};
}

TileConfig TileConfig::from_list(const std::vector<int64_t>& list) {
  check(list.size() == 7, "TileConfig: a flat config has 7 numbers, got ", list.size());
  for (const int64_t value : list) {
    check(value >= 1 && value <= 1024, "TileConfig: every number must be in 1..1024, got ", value);
  }
  const auto at = [&](int i) { return static_cast<int>(list[i]); };
  const TileConfig config{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  config.validate();
  return config;
}

double estimate(const Problem& p, const TileConfig& c) {
  p.validate();
  c.validate();
  const double tiles = static_cast<double>(tiles_of(p, c.block_m, c.block_n)) * c.split_k;
  const double active = std::min<double>(tiles, p.num_sms);
  const double waves = std::max(1.0, std::ceil(tiles / p.num_sms));

  // One K step of one tile: the tensor cores against the loads that feed them. One m64nNk16 takes
  // max(N / 2, 16 + N / 4) clocks; multicast halves the slab that a pair shares.
  const double tensor =
      (c.block_m / 64.0) * (kBlockK / 16.0) * std::max(c.block_n / 2.0, 16 + c.block_n / 4.0);
  const double loaded =
      kElement * kBlockK * (double(c.block_m) / c.cluster_n + double(c.block_n) / c.cluster_m);
  const double per_sm = std::min(kL2PerSm, kL2Total / std::max(active, 1.0));
  const double step = std::max(tensor, loaded / per_sm);

  const double steps = static_cast<double>(ceil_div(steps_of(p), c.split_k));
  const double fill = c.stages * loaded / per_sm;  // the first tile waits for its ring
  const double drain =
      kElement * double(c.block_m) * c.block_n / per_sm;  // the last one is stored alone
  const double compute = waves * (steps * step + kTile) + fill + drain;

  const double m = p.m, n = p.n, k = p.k;
  const double traffic = kElement * (m * k + n * k + m * n) / kDram;
  const double partials = c.split_k == 1 ? 0 : kReduceLaunch + 8.0 * c.split_k * m * n / kL2Total;
  return kLaunch + std::max(compute, traffic) + partials;
}

std::vector<TileConfig> candidates(const Problem& p) {
  p.validate();
  std::vector<Ranked> ranked;
  for (const auto& [block_m, block_n] : kTiles) {
    for (const auto& [cluster_m, cluster_n] : {std::array{1, 1}, {2, 1}, {1, 2}}) {
      for (const int split_k : kSplits) {
        const TileConfig config{block_m,   block_n, most_stages(block_m, block_n), cluster_m,
                                cluster_n, split_k, group_for(p, block_m, block_n)};
        const bool one_wave = tiles_of(p, block_m, block_n) * split_k <= p.num_sms;
        // A pair needs a second tile beside the first, and pays only when tiles queue for SMs.
        const bool paired = cluster_m * cluster_n == 2;
        const bool has_partner =
            ceil_div(p.m, block_m) >= cluster_m && ceil_div(p.n, block_n) >= cluster_n;
        if (paired && (one_wave || !has_partner)) continue;
        // Splitting K is for idle SMs.
        if (split_k > 1 && (!one_wave || steps_of(p) < split_k * kMinStepsPerSplit)) continue;
        ranked.push_back({estimate(p, config), config});
      }
    }
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const Ranked& a, const Ranked& b) { return a.clocks < b.clocks; });
  std::vector<TileConfig> configs;
  for (const Ranked& entry : ranked) configs.push_back(entry.config);
  return configs;
}

TileConfig plan(const Problem& problem) { return candidates(problem).front(); }

std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << "Problem(m=" << p.m << ", n=" << p.n << ", k=" << p.k << ", rank=" << p.rank
             << ", dtype=\"" << p.dtype << "\", num_sms=" << p.num_sms << ")";
}

std::ostream& operator<<(std::ostream& out, const TileConfig& c) {
  return out << "TileConfig(block_m=" << c.block_m << ", block_n=" << c.block_n
             << ", stages=" << c.stages << ", cluster_m=" << c.cluster_m
             << ", cluster_n=" << c.cluster_n << ", split_k=" << c.split_k
             << ", group_m=" << c.group_m << ")";
}

}  // namespace fastlora
