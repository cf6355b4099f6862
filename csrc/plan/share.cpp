// The model. Constants are of an H200 (benchmarks/NOTES.md).
#include "plan/share.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "host/check.h"

namespace fastlora {
namespace {

constexpr double kTileUsPerK = 44.0 / 4096;  // power decides the clock, the clock this
// While others multiply, a cluster streams 98 GB/s; all memory gives 4.2 TB/s.
constexpr double kClusterElements = 98e3 / 2, kMemoryElements = 4.2e6 / 2;  // in a us
constexpr double kContention = 0.09e-6;  // us that all lose by an element streamed beside tiles
constexpr double kPassUs = 4;  // until the first item of a pass streams, and its last sum is there
constexpr int kParts = 8;      // in which dA is shared
constexpr std::array<int, 7> kHelpers = {8, 6, 12, 16, 4, 24, 33};

double stream_us(double elements, int helpers) {
  if (elements == 0) return 0;
  return elements / std::min(helpers * kClusterElements, kMemoryElements) + kPassUs;
}

}  // namespace

double estimate(const LinearWork& work, const Share& share) {
  check(work.clusters >= 1 && work.tiles >= 1 && work.k >= 1 && work.row_groups >= 1 &&
            work.down >= 0 && work.wgrad_a >= 0 && work.wgrad_b >= 0,
        "LinearWork: clusters, tiles, k and row_groups must be positive, passes not negative");
  check(share.helpers >= 1 && share.helpers <= work.clusters,
        "Share: helpers must be 1 to the number of clusters, got ", share.helpers);
  check(share.a_early >= 0 && share.a_early <= 1, "Share: a_early must be 0 to 1, got ",
        share.a_early);
  const double tile = static_cast<double>(work.k) * kTileUsPerK;
  double early = static_cast<double>(work.down), late = 0;
  (share.b_early ? early : late) += static_cast<double>(work.wgrad_b);
  early += share.a_early * static_cast<double>(work.wgrad_a);
  late += (1 - share.a_early) * static_cast<double>(work.wgrad_a);
  const double early_us = stream_us(early, share.helpers);
  const int others = work.clusters - share.helpers;

  // When the last tile ends: the clusters' rounds of tiles, helpers' beginning later.
  const auto done = [&](double at) {
    const double by_helpers = at < early_us ? 0 : std::floor((at - early_us) / tile + 1e-9);
    return others * std::floor(at / tile + 1e-9) + share.helpers * by_helpers;
  };
  const auto tiles = static_cast<double>(work.tiles);
  const auto first_enough = [&](double from) {
    double at = from + std::max(1., std::floor(tiles / work.clusters)) * tile;
    while (done(at) < tiles) {
      at += tile * std::max(1., std::floor((tiles - done(at)) / work.clusters));
    }
    return at;
  };
  const double behind = early_us - std::floor(early_us / tile) * tile;
  double end = std::min(first_enough(0), first_enough(behind));
  end = std::max(end, early_us);
  // The first tiles end only when the h of their rows is there.
  const double first = stream_us(
      static_cast<double>(work.down) / static_cast<double>(work.row_groups), share.helpers);
  end += std::max(0., first - tile);
  end += early * kContention;
  return end + (late > 0 ? late / kMemoryElements + kPassUs : 0);
}

Share share_work(const LinearWork& work) {
  const bool no_b = work.wgrad_b == 0;
  Share best{work.clusters, no_b, 0};
  double least = estimate(work, best);
  const auto consider = [&](const Share& share) {
    const double us = estimate(work, share);
    if (us >= least - 0.5) return;
    least = us;
    best = share;
  };
  for (const bool b_early : {false, true}) {
    if (no_b && !b_early) continue;
    const int most_a = b_early && work.wgrad_a > 0 ? kParts : 0;
    for (const int helpers : kHelpers) {
      if (helpers > work.clusters) continue;
      for (int a = 0; a <= most_a; ++a) {
        consider({helpers, b_early, static_cast<double>(a) / kParts});
      }
    }
    consider({work.clusters, b_early, b_early ? 1. : 0.});
  }
  return best;
}

}  // namespace fastlora
