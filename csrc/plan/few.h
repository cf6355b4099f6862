// How a linear of few rows (csrc/few) is cut for the SMs of a device. Pure host C++.
#pragma once

#include <cstdint>

#include "few/few.h"

namespace fastlora {

// y [m, n] = x [m, k] W^T with an update of `rank` on a GPU of num_sms SMs.
struct FewWork {
  int64_t m, n, k, rank;
  int num_sms;
};

// Predicted time in us of an H200; infinite where a configuration cannot be.
double estimate(const FewWork& work, const FewConfig& config);

// The best configuration.
FewConfig plan_few(const FewWork& work);

}  // namespace fastlora
