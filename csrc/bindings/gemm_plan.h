// How a GEMM's tiles are chosen where the caller gives none.
#pragma once

#include "gemm/gemm.h"
#include "plan/plan.h"

namespace fastlora {

// The best candidate that `takes` accepts, or `otherwise`; remembered, since a model asks for the
// same few problems all the time. `family` keeps the answers of kernels apart.
GemmConfig planned(int family, const Problem& problem, bool (*takes)(const TileConfig&),
                   const GemmConfig& otherwise);

}  // namespace fastlora
