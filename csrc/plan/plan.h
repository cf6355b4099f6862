// Chooses how the tensor-core GEMM cuts a problem: Problem -> TileConfig. Pure host C++, no CUDA
// and no torch, so it is tested and swept on any machine; fastlora._core binds it to Python.
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

namespace fastlora {

// y [m, n] = x [m, k] W^T + h [m, rank] B^T: the product whose K loop is extended by the rank.
struct Problem {
  int64_t m, n, k;
  int64_t rank = 0;
  std::string dtype = "bfloat16";  // or "float16"
  int num_sms = 132;               // of the GPU that will run it

  void validate() const;  // throws std::invalid_argument
};

struct TileConfig {
  int block_m, block_n;  // output tile of one CTA; the K step is always kBlockK
  int stages;            // depth of the shared-memory ring
  int cluster_m,
      cluster_n;  // CTAs that share a W (cluster_m) or an x (cluster_n) slab by multicast
  int split_k;    // parts of K, summed in fixed order
  int group_m;    // block rows walked together, so that they share W in L2

  int64_t shared_memory() const;  // bytes a CTA uses
  void validate() const;          // throws std::invalid_argument

  // The flat form that ops take as `int[]? config`: the seven numbers in the order above.
  std::vector<int64_t> to_list() const;
  static TileConfig from_list(const std::vector<int64_t>& list);
  bool operator==(const TileConfig& other) const { return to_list() == other.to_list(); }
};

constexpr int kBlockK = 64;                // 128 bytes of a 16-bit type: one swizzle atom
constexpr int64_t kSharedMemory = 232448;  // bytes a CTA may use on sm_90
constexpr std::array<std::array<int, 2>, 6> kTiles = {
    {{128, 256}, {256, 128}, {128, 192}, {128, 128}, {64, 256}, {64, 128}}};

// Predicted time in SM clocks. A model to rank configurations by, not a promise.
double estimate(const Problem& problem, const TileConfig& config);

// Every sensible configuration, best prediction first; never empty. plan() is its first entry.
std::vector<TileConfig> candidates(const Problem& problem);
TileConfig plan(const Problem& problem);

std::ostream& operator<<(std::ostream& out, const Problem& problem);
std::ostream& operator<<(std::ostream& out, const TileConfig& config);

}  // namespace fastlora
