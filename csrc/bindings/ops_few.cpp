// fastlora::_lora_few_sm90: checks, allocation, plan, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "few/few.h"
#include "gemm/gemm.h"
#include "host/stream.h"
#include "plan/few.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr auto kOp = "_lora_few_sm90";

// A factor [rows, cols] of x's dtype or float32.
int64_t factor_pitch(const char* name, const Tensor& t, int64_t rows, int64_t cols,
                     const Tensor& x) {
  if (t.scalar_type() != ScalarType::Float) return pitch_of(kOp, name, t, rows, cols, x);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.stride(1) == 1 &&
            t.get_device_index() == x.get_device_index(),
        kOp, ": a float32 ", name, " must be [", rows, ", ", cols,
        "] with contiguous rows, on x's device");
  return rows == 1 ? cols : t.stride(0);
}

// y [m, n] and h [m, rank]; backward, where x is dY, dX [m, K] and g [m, rank].
std::tuple<Tensor, Tensor> few(const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b,
                               std::optional<Tensor> bias, std::optional<Tensor> scaling,
                               double scale, bool backward,
                               std::optional<std::vector<int64_t>> config) {
  check(x.dim() == 2 && w.dim() == 2 && a.dim() == 2, kOp,
        ": x, w and the factors must be matrices");
  check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, kOp,
        ": x must be bfloat16 or float16");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  FewParams p{};
  const int64_t out = w.size(0), in = w.size(1);
  p.m = x.size(0);
  p.n = backward ? in : out;
  p.k = backward ? out : in;
  p.rank = a.size(0);
  check(p.m > 0 && p.n > 0 && p.k > 0 && p.rank > 0, kOp, ": nothing may be empty");
  p.half = x.scalar_type() == ScalarType::Half;
  p.w_mn_major = backward;
  p.x_pitch = pitch_of(kOp, "x", x, p.m, p.k, x);
  p.x = x.const_data_ptr();
  p.w_pitch = pitch_of(kOp, "w", w, out, in, x);
  p.w = w.const_data_ptr();
  // The factor that x meets first is A, backward B.
  const int64_t a_pitch = factor_pitch("lora_A", a, p.rank, in, x);
  const int64_t b_pitch = factor_pitch("lora_B", b, out, p.rank, x);
  const Tensor &first = backward ? b : a, &second = backward ? a : b;
  p.a_pitch = backward ? b_pitch : a_pitch;
  p.a = first.const_data_ptr();
  p.a_float = first.scalar_type() == ScalarType::Float;
  p.b_pitch = backward ? a_pitch : b_pitch;
  p.b = second.const_data_ptr();
  p.b_float = second.scalar_type() == ScalarType::Float;
  if (bias.has_value()) {
    check(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == p.n &&
              bias->is_contiguous() && bias->get_device_index() == x.get_device_index(),
          kOp, ": bias must be a contiguous [n] of x's dtype and device");
    p.bias = bias->const_data_ptr();
  }
  p.scale = static_cast<float>(scale);
  if (scaling.has_value()) {
    check(scaling->scalar_type() == ScalarType::Float && scaling->numel() == 1 &&
              scaling->get_device_index() == x.get_device_index(),
          kOp, ": scaling must be one float32 on x's device");
    p.scaling = scaling->const_data_ptr<float>();
  }
  FewConfig chosen;
  if (config.has_value()) {
    check(config->size() == 3, kOp, ": config must be [columns, cluster_m, splits]");
    chosen = {static_cast<int>((*config)[0]), static_cast<int>((*config)[1]),
              static_cast<int>((*config)[2])};
  } else {
    chosen = plan_few({p.m, p.n, p.k, p.rank, multiprocessors(x.get_device_index())});
  }
  const Tensor y = new_empty({p.m, p.n}, x.scalar_type(), x);
  const Tensor h = new_empty({p.m, p.rank}, x.scalar_type(), x);
  p.y = y.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  few_sm90(p, chosen, current_stream(x.get_device_index()));
  return {y, h};
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) { m.impl("_lora_few_sm90", TORCH_BOX(&few)); }

}  // namespace
}  // namespace fastlora
