// How a low-rank linear (csrc/lora) shares its work among clusters of SMs: which of its passes over
// memory are made beside the tiles, by how many clusters, and which after them. Pure host C++.
#pragma once

#include <cstdint>

namespace fastlora {

// Passes over activations, in elements of 16 bits; `wgrad` may be none.
struct LinearWork {
  int clusters;        // pairs of SMs
  int64_t tiles;       // of 256 x 256, a cluster's
  int64_t k;           // depth of a tile, the rank with it
  int64_t row_groups;  // tiles are walked in so many groups of rows
  int64_t down;        // what h is made from: before the tiles are done
  int64_t wgrad_b;     // what dB is, at any time, unless of the same read
  int64_t wgrad_a;     // what dA is, after `down`
};

struct Share {
  int helpers;     // clusters that begin with passes instead of tiles
  bool b_early;    // this pass is the helpers'; else everybody's, after the tiles
  double a_early;  // the share of this pass that is, 0 to 1
};

// Predicted time in us of an H200.
double estimate(const LinearWork& work, const Share& share);

// The best share. All of dB is early before any of dA.
Share share_work(const LinearWork& work);

}  // namespace fastlora
