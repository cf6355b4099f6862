// fastlora::_lora_forward_sm90, _lora_scaled_sm90 and _lora_backward_sm90: checks, allocation,
// plan, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/gemm_plan.h"
#include "bindings/tensors.h"
#include "common/philox.cuh"
#include "host/counters.h"
#include "host/stream.h"
#include "host/switches.h"
#include "lora/lora.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalConfig = std::optional<std::vector<int64_t>>;

GradType grad_type(ScalarType type) {
  return type == ScalarType::Float  ? GradType::kFloat32
         : type == ScalarType::Half ? GradType::kFloat16
                                    : GradType::kBfloat16;
}

// A factor of the update [rows, cols] as the kernel reads it: as it is, or where a cast leaves it.
Tensor factor_of(const char* name, const Tensor& t, int64_t rows, int64_t cols, const Tensor& x,
                 LoraParams::Cast& cast) {
  if (t.scalar_type() != ScalarType::Float) return t;
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.is_contiguous() &&
            t.get_device_index() == x.get_device_index(),
        "_lora_sm90: a float32 ", name, " must be a contiguous [", rows, ", ", cols,
        "] on x's device");
  const Tensor rounded = new_empty({rows, cols}, x.scalar_type(), x);
  cast.from = t.const_data_ptr<float>();
  cast.to = rounded.mutable_data_ptr();
  cast.elements = rows * cols;
  return rounded;
}

bool takes(const TileConfig& tile) {
  return tile.split_k == 1 && tile.cluster_m * tile.cluster_n == 2 &&
         tile.block_m * tile.cluster_m == 256 && tile.block_m * tile.block_n == 128 * 256;
}

// What there is in any case, and all there is with dropout.
constexpr GemmConfig kOnlyTile{128, 256, 2, 1, 16};

// What both directions have in common. x is dY in backward, `out_features` K.
struct Call {
  LoraParams params{};
  Tensor y, h, first, second;  // alive until the launch

  Call(const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b, bool backward,
       const OptionalTensor& scaling, double scale) {
    check(x.dim() == 2 && w.dim() == 2 && a.dim() == 2,
          "_lora_sm90: x, w and the factors must be matrices");
    check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
          "_lora_sm90: x must be bfloat16 or float16");
    GemmParams& gemm = params.gemm;
    gemm.m = x.size(0);
    gemm.n = w.size(backward ? 1 : 0);
    gemm.k = w.size(backward ? 0 : 1);
    gemm.rank = a.size(0);
    gemm.half = x.scalar_type() == ScalarType::Half;
    gemm.w_mn_major = backward;
    check(gemm.m > 0 && gemm.n > 0 && gemm.k > 0, "_lora_sm90: nothing may be empty");
    gemm.x_pitch = pitch_of("_lora_sm90", backward ? "dy" : "x", x, gemm.m, gemm.k, x);
    gemm.x = x.const_data_ptr();
    gemm.w_pitch = pitch_of("_lora_sm90", "w", w, w.size(0), w.size(1), x);
    gemm.w = w.const_data_ptr();
    const int64_t in = w.size(1), out = w.size(0);
    const Tensor a_read = factor_of("lora_A", a, gemm.rank, in, x, params.casts[0]);
    const Tensor b_read = factor_of("lora_B", b, out, gemm.rank, x, params.casts[1]);
    const int64_t a_pitch = pitch_of("_lora_sm90", "lora_A", a_read, gemm.rank, in, x);
    const int64_t b_pitch = pitch_of("_lora_sm90", "lora_B", b_read, out, gemm.rank, x);
    first = backward ? b_read : a_read;
    second = backward ? a_read : b_read;
    params.factor = first.const_data_ptr();
    params.factor_pitch = backward ? b_pitch : a_pitch;
    gemm.l = second.const_data_ptr();
    gemm.l_pitch = backward ? a_pitch : b_pitch;
    y = new_empty({gemm.m, gemm.n}, x.scalar_type(), x);
    h = new_empty({gemm.m, gemm.rank}, x.scalar_type(), x);
    gemm.y = y.mutable_data_ptr();
    gemm.y_pitch = gemm.n;
    gemm.h = h.mutable_data_ptr();
    gemm.h_pitch = gemm.rank;
    params.scale = static_cast<float>(scale);
    params.one_read = !switched_off("one_read");
    params.beside = !switched_off("beside");
    if (scaling.has_value()) {
      check(scaling->scalar_type() == ScalarType::Float && scaling->numel() == 1 &&
                scaling->get_device_index() == x.get_device_index(),
            "_lora_sm90: scaling must be one float32 on x's device");
      params.scaling = scaling->const_data_ptr<float>();
    }
  }

  // Dropout of x by its state (two int64 on the device), keeping keep / 65536.
  void drop(const OptionalTensor& rng_state, int64_t keep, const Tensor& x) {
    if (!rng_state.has_value()) return;
    check(rng_state->scalar_type() == ScalarType::Long && rng_state->numel() == 2 &&
              rng_state->dim() == 1 && rng_state->get_device_index() == x.get_device_index(),
          "_lora_sm90: rng_state must be an int64 tensor of 2 elements on x's device");
    check(0 <= keep && keep <= kKeepAll, "_lora_sm90: keep must be in 0..", kKeepAll);
    params.rng_state = rng_state->const_data_ptr<int64_t>();
    params.rng_stride = rng_state->stride(0);
    params.keep = static_cast<uint32_t>(keep);
  }

  void add_bias(const OptionalTensor& bias, const Tensor& x) {
    if (!bias.has_value()) return;
    check(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 &&
              bias->size(0) == params.gemm.n && bias->is_contiguous() &&
              bias->get_device_index() == x.get_device_index(),
          "_lora_sm90: bias must be a contiguous [n] of x's dtype and device");
    params.gemm.bias = bias->const_data_ptr();
  }

  void launch(const Tensor& x, const OptionalConfig& config) {
    const int32_t device = x.get_device_index();
    CUstream_st* const stream = current_stream(device);
    const GemmParams& gemm = params.gemm;
    const int num_sms = multiprocessors(device);
    GemmConfig chosen;
    if (config.has_value()) {
      const TileConfig tile = TileConfig::from_list(*config);
      check(tile.split_k == 1, "_lora_sm90: split_k must be 1, got ", tile.split_k);
      chosen = {tile.block_m, tile.block_n, tile.cluster_m, tile.cluster_n, tile.group_m};
    } else {
      chosen = planned(
          1, {gemm.m, gemm.n, gemm.k, gemm.rank, gemm.half ? "float16" : "bfloat16", num_sms},
          takes, kOnlyTile);
    }
    if (params.rng_state != nullptr && !config.has_value()) chosen = kOnlyTile;
    chosen.num_sms = num_sms;
    const LoraSizes sizes = lora_sm90_sizes(params, chosen);
    const Tensor workspace = new_empty({sizes.workspace_bytes}, ScalarType::Byte, x);
    const Tensor words = new_empty({sizes.words}, ScalarType::Int, x);
    params.words = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
    params.workspace = workspace.mutable_data_ptr();
    Tensor counters = workspace;  // alive until the launch
    std::optional<StreamCounters> kept;
    if (is_capturing(stream)) {
      counters = new_empty({sizes.counters}, ScalarType::Int, x);
      params.counters = static_cast<uint32_t*>(counters.mutable_data_ptr());
      zero_async(params.counters, sizes.counters * 4, stream);
    } else {
      kept.emplace(device, stream, sizes.counters);
      params.counters = kept->zeros();
      params.used = kept->used();
      params.used_count = kept->used_count();
    }
    lora_sm90(params, chosen, stream);
    if (kept.has_value()) kept->launched();
  }
};

// y [m, n] and h [m, rank].
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& w, const Tensor& a,
                                   const Tensor& b, OptionalTensor bias, OptionalTensor scaling,
                                   double scale, OptionalTensor rng_state, int64_t keep,
                                   OptionalConfig config) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call(x, w, a, b, false, scaling, scale);
  call.drop(rng_state, keep, x);
  call.add_bias(bias, x);
  call.launch(x, config);
  return {call.y, call.h};
}

// y [m, n], h [m, rank], z [m, n] or shape [0].
std::tuple<Tensor, Tensor, Tensor> scaled(const Tensor& x, const Tensor& w, const Tensor& a,
                                          const Tensor& b, OptionalTensor bias,
                                          OptionalTensor scaling, double scale,
                                          const Tensor& columns, bool with_z,
                                          OptionalConfig config) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call(x, w, a, b, false, scaling, scale);
  call.add_bias(bias, x);
  const int64_t m = call.params.gemm.m, n = call.params.gemm.n;
  check(columns.scalar_type() == ScalarType::Float && columns.dim() == 1 && columns.size(0) == n &&
            columns.is_contiguous() && columns.get_device_index() == x.get_device_index(),
        "_lora_sm90: columns must be a contiguous float32 [n] on x's device");
  call.params.columns = columns.const_data_ptr<float>();
  Tensor z = new_empty({0}, x.scalar_type(), x);
  if (with_z) {
    z = new_empty({m, n}, x.scalar_type(), x);
    call.params.z = z.mutable_data_ptr();
  }
  call.launch(x, config);
  return {call.y, call.h, z};
}

// dX [m, K], dA [rank, K], dB [N, rank], dbias [N]; shape [0] for what was not asked.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& w, const Tensor& a, const Tensor& b, OptionalTensor x,
    OptionalTensor h, OptionalTensor scaling, double scale, OptionalTensor rng_state, int64_t keep,
    bool bias, bool float_bias, OptionalConfig config) {
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Call call(dy, w, a, b, true, scaling, scale);
  call.drop(rng_state, keep, dy);
  LoraParams& params = call.params;
  const int64_t m = params.gemm.m, rank = params.gemm.rank, in = params.gemm.n, out = params.gemm.k;
  const Tensor none = new_empty({0}, dy.scalar_type(), dy);
  Tensor d_a = none, d_b = none, d_bias = none;
  if (x.has_value()) {
    params.x_pitch = pitch_of("_lora_sm90", "x", *x, m, in, dy);
    params.x = x->const_data_ptr();
    d_a = new_empty({rank, in}, a.scalar_type(), dy);
    params.d_a = d_a.mutable_data_ptr();
    params.type_a = grad_type(a.scalar_type());
  }
  if (h.has_value()) {
    params.h_pitch = pitch_of("_lora_sm90", "h", *h, m, rank, dy);
    params.h = h->const_data_ptr();
    d_b = new_empty({out, rank}, b.scalar_type(), dy);
    params.d_b = d_b.mutable_data_ptr();
    params.type_b = grad_type(b.scalar_type());
  }
  if (bias) {
    d_bias = new_empty({out}, float_bias ? ScalarType::Float : dy.scalar_type(), dy);
    params.d_bias = d_bias.mutable_data_ptr();
    params.type_bias = grad_type(d_bias.scalar_type());
  }
  call.launch(dy, config);
  return {call.y, d_a, d_b, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("_lora_forward_sm90", TORCH_BOX(&forward));
  m.impl("_lora_scaled_sm90", TORCH_BOX(&scaled));
  m.impl("_lora_backward_sm90", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace fastlora
