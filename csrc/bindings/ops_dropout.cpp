// fastlora::_dropout_mask: checks, allocation, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/philox.cuh"
#include "dropout/dropout.h"
#include "host/check.h"
#include "host/stream.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRows = int64_t{1} << 32;  // 8 unit rows for 32 rows, and 4 Philox calls for
constexpr int64_t kMaxCols = int64_t{1} << 33;  // 8 columns, are each counted in 32 bits

Tensor allocate(const Tensor& rng_state, int64_t rows, int64_t cols, int64_t keep) {
  check(
      rng_state.scalar_type() == ScalarType::Long && rng_state.numel() == 2 && rng_state.dim() == 1,
      "_dropout_mask: rng_state must be an int64 tensor of 2 elements (seed, offset)");
  check(0 <= rows && rows <= kMaxRows, "_dropout_mask: rows must be in 0..2^32, got ", rows);
  check(0 <= cols && cols <= kMaxCols, "_dropout_mask: cols must be in 0..2^33, got ", cols);
  check(0 <= keep && keep <= kKeepAll, "_dropout_mask: keep must be in 0..", kKeepAll, ", got ",
        keep);
  const int64_t size[] = {8 * ceil_div(rows, 32), ceil_div(cols, 8)};
  return torch::stable::empty({size, 2}, ScalarType::Int, std::nullopt, rng_state.device());
}

DropoutMask params_of(const Tensor& rng_state, const Tensor& words, int64_t keep) {
  return {rng_state.const_data_ptr<int64_t>(),
          rng_state.stride(0),
          reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()),
          words.size(0),
          words.size(1),
          static_cast<uint32_t>(keep)};
}

Tensor on_cpu(const Tensor& rng_state, int64_t rows, int64_t cols, int64_t keep) {
  const Tensor words = allocate(rng_state, rows, cols, keep);
  const DropoutMask params = params_of(rng_state, words, keep);
  constexpr int64_t kGrain = 1024;  // words: some 20 us of work, more than waking a thread costs
  torch::stable::parallel_for(
      0, params.unit_rows * params.unit_cols, kGrain,
      [&](int64_t begin, int64_t end) { dropout_mask_cpu(params, begin, end); });
  return words;
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("_dropout_mask", TORCH_BOX(&on_cpu)); }

#ifdef FASTLORA_WITH_CUDA
Tensor on_cuda(const Tensor& rng_state, int64_t rows, int64_t cols, int64_t keep) {
  const int32_t device = rng_state.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor words = allocate(rng_state, rows, cols, keep);
  dropout_mask_cuda(params_of(rng_state, words, keep), current_stream(device));
  return words;
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) { m.impl("_dropout_mask", TORCH_BOX(&on_cuda)); }
#endif

}  // namespace
}  // namespace fastlora
