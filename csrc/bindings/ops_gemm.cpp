// fastlora::_gemm_sm90: checks, allocation, plan, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "bindings/gemm_plan.h"
#include "gemm/gemm.h"
#include "host/check.h"
#include "host/stream.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix as TMA sees it: contiguous rows `pitch` apart.
struct Rows {
  const void* data;
  int64_t pitch;
};

Rows rows_of(const char* name, const Tensor& t, bool transposed) {
  check(t.dim() == 2, "_gemm_sm90: ", name, " must be a matrix, got ", t.dim(), " dimensions");
  const int along = transposed ? 0 : 1;
  check(t.stride(along) == 1 || t.size(along) == 1, "_gemm_sm90: ", name, " must be contiguous ",
        transposed ? "down its columns" : "along its rows");
  // A single row has no neighbour: its pitch is whatever is legal.
  const int64_t length = t.size(along);
  const int64_t pitch = t.size(1 - along) == 1 ? (length + 7) / 8 * 8 : t.stride(1 - along);
  return {t.const_data_ptr(), pitch};
}

void check_like(const char* name, const Tensor& t, const Tensor& x, int64_t rows, int64_t cols) {
  check(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index(),
        "_gemm_sm90: ", name, " must have x's dtype and device");
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, "_gemm_sm90: ", name, " must be [",
        rows, ", ", cols, "]");
}

Tensor gemm(const Tensor& x, const Tensor& w, std::optional<Tensor> h, std::optional<Tensor> l,
            std::optional<Tensor> bias, std::optional<Tensor> words,
            std::optional<std::vector<int64_t>> config) {
  check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
        "_gemm_sm90: x must be bfloat16 or float16");
  check(x.dim() == 2 && w.dim() == 2, "_gemm_sm90: x and w must be matrices");
  const int64_t m = x.size(0), k = x.size(1), n = w.size(0);
  check_like("w", w, x, n, k);
  check(h.has_value() == l.has_value(), "_gemm_sm90: h and l come together");

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t size[] = {m, n};
  const Tensor y = torch::stable::empty({size, 2}, x.scalar_type(), std::nullopt, x.device());
  if (m == 0 || n == 0) return y;

  GemmParams params{};
  params.m = m;
  params.n = n;
  params.k = k;
  params.half = x.scalar_type() == ScalarType::Half;
  params.w_mn_major = w.stride(1) != 1;
  const Rows x_rows = rows_of("x", x, false), w_rows = rows_of("w", w, params.w_mn_major);
  params.x = x_rows.data;
  params.x_pitch = x_rows.pitch;
  params.w = w_rows.data;
  params.w_pitch = w_rows.pitch;
  params.y = y.mutable_data_ptr();
  params.y_pitch = n;
  if (h.has_value()) {
    check(h->dim() == 2, "_gemm_sm90: h must be a matrix");
    params.rank = h->size(1);
  }
  if (params.rank > 0) {
    check_like("h", *h, x, m, params.rank);
    check_like("l", *l, x, n, params.rank);
    const Rows h_rows = rows_of("h", *h, false), l_rows = rows_of("l", *l, params.w_mn_major);
    params.h = h_rows.data;
    params.h_pitch = h_rows.pitch;
    params.l = l_rows.data;
    params.l_pitch = l_rows.pitch;
  }
  if (bias.has_value()) {
    check(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == n &&
              bias->is_contiguous() && bias->get_device_index() == device,
          "_gemm_sm90: bias must be a contiguous [", n, "] of x's dtype and device");
    params.bias = bias->const_data_ptr();
  }
  if (words.has_value()) {
    check(words->scalar_type() == ScalarType::Int && words->dim() == 2 && words->is_contiguous() &&
              words->size(0) == (m + 31) / 32 * 8 && words->size(1) == (n + 7) / 8 &&
              words->get_device_index() == device,
          "_gemm_sm90: words must be the contiguous mask of [", m, ", ", n, "] on x's device");
    params.mask = reinterpret_cast<const uint32_t*>(words->const_data_ptr<int32_t>());
    params.mask_pitch = words->size(1);
  }

  const int num_sms = multiprocessors(device);
  GemmConfig chosen;
  if (config.has_value()) {
    const TileConfig tile = TileConfig::from_list(*config);
    check(tile.split_k == 1, "_gemm_sm90: split_k must be 1, got ", tile.split_k);
    chosen = {tile.block_m, tile.block_n, tile.cluster_m, tile.cluster_n, tile.group_m};
  } else {
    // The kernel does not split K.
    chosen = planned(
        0, {m, n, k, params.rank, params.half ? "float16" : "bfloat16", num_sms},
        [](const TileConfig& tile) { return tile.split_k == 1; }, GemmConfig{});
  }
  chosen.num_sms = num_sms;
  gemm_sm90(params, chosen, current_stream(device));
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) { m.impl("_gemm_sm90", TORCH_BOX(&gemm)); }

}  // namespace
}  // namespace fastlora
