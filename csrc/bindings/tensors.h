// What the bindings of the Hopper kernels need of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "common/index.cuh"
#include "host/check.h"

namespace fastlora {

inline torch::stable::Tensor new_empty(std::initializer_list<int64_t> size,
                                       torch::headeronly::ScalarType type,
                                       const torch::stable::Tensor& like) {
  return torch::stable::empty({size.begin(), size.size()}, type, std::nullopt, like.device());
}

// Pitch of a [rows, cols] matrix with contiguous rows, of `like`'s dtype and device.
inline int64_t pitch_of(const char* op, const char* name, const torch::stable::Tensor& t,
                        int64_t rows, int64_t cols, const torch::stable::Tensor& like) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols &&
            t.scalar_type() == like.scalar_type() &&
            t.get_device_index() == like.get_device_index(),
        op, ": ", name, " must be [", rows, ", ", cols, "] of x's dtype and device");
  check(t.stride(1) == 1 || cols == 1, op, ": ", name, " must have contiguous rows");
  return rows == 1 ? ceil_div(cols, 8) * 8 : t.stride(0);
}

}  // namespace fastlora
