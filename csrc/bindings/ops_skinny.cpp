// fastlora::_down_sm90 and _wgrad_sm90: checks, allocation, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/tensors.h"
#include "common/philox.cuh"
#include "down/down.h"
#include "host/stream.h"
#include "wgrad/wgrad.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The pitch of a matrix with contiguous rows; a single row's is whatever is legal.
int64_t pitch_of(const char* name, const Tensor& t, const Tensor& like) {
  check(t.dim() == 2 && t.scalar_type() == like.scalar_type() &&
            t.get_device_index() == like.get_device_index(),
        name, " must be a matrix of the first input's dtype and device");
  check(t.stride(1) == 1 || t.size(1) == 1, name, " must be contiguous along its rows");
  return t.size(0) == 1 ? ceil_div(t.size(1), 8) * 8 : t.stride(0);
}

bool is_half(const Tensor& t) {
  check(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16,
        "the kernel takes bfloat16 and float16");
  return t.scalar_type() == ScalarType::Half;
}

// h [m, round_up(r, 8)] (columns r and up are zero), the mask words, and `cast` [rows, cols]
// rounded to x's dtype, its rows padded to a multiple of 8; shape [0] for what was not asked.
std::tuple<Tensor, Tensor, Tensor> down(const Tensor& x, const Tensor& l, OptionalTensor scaling,
                                        double scale, OptionalTensor rng_state, int64_t keep,
                                        int64_t emit_cols, OptionalTensor cast) {
  DownParams params{};
  params.half = is_half(x);
  check(l.dim() == 2 && x.dim() == 2 && l.size(1) == x.size(1),
        "_down_sm90: x and l must be matrices of as many columns");
  check(l.scalar_type() == ScalarType::Float || l.scalar_type() == x.scalar_type(),
        "_down_sm90: l must have x's dtype or float32");
  const int32_t device = x.get_device_index();
  check(l.get_device_index() == device, "_down_sm90: l must be on x's device");
  check(x.size(0) > 0 && x.size(1) > 0 && l.size(0) > 0,
        "_down_sm90: x and l must not be empty, got [", x.size(0), ", ", x.size(1), "] and rank ",
        l.size(0));
  params.m = x.size(0);
  params.k = x.size(1);
  params.rank = l.size(0);
  params.x_pitch = pitch_of("_down_sm90: x", x, x);
  params.x = x.const_data_ptr();
  params.l = l.const_data_ptr();
  params.l_float = l.scalar_type() == ScalarType::Float;
  params.l_stride_rank = l.stride(0);
  params.l_stride_k = l.stride(1);
  params.scale = static_cast<float>(scale);
  if (scaling.has_value()) {
    check(scaling->scalar_type() == ScalarType::Float && scaling->numel() == 1 &&
              scaling->get_device_index() == device,
          "_down_sm90: scaling must be one float32 on x's device");
    params.scaling = scaling->const_data_ptr<float>();
  }

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t pitch = ceil_div(params.rank, 8) * 8;
  const Tensor h = new_empty({params.m, pitch}, x.scalar_type(), x);
  params.out = h.mutable_data_ptr();
  params.out_pitch = pitch;
  const bool emit = rng_state.has_value() && emit_cols > 0;
  const Tensor words =
      emit ? new_empty({8 * ceil_div(params.m, 32), ceil_div(emit_cols, 8)}, ScalarType::Int, x)
           : new_empty({0}, ScalarType::Int, x);
  if (rng_state.has_value()) {
    check(rng_state->scalar_type() == ScalarType::Long && rng_state->numel() == 2 &&
              rng_state->dim() == 1 && rng_state->get_device_index() == device,
          "_down_sm90: rng_state must be an int64 tensor of 2 elements on x's device");
    check(0 <= keep && keep <= kKeepAll, "_down_sm90: keep must be in 0..", kKeepAll);
    params.rng_state = rng_state->const_data_ptr<int64_t>();
    params.rng_stride = rng_state->stride(0);
    params.keep = static_cast<uint32_t>(keep);
    if (emit) {
      params.words = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
      params.emit_cols = emit_cols;
    }
  }
  Tensor rounded = new_empty({0}, x.scalar_type(), x);
  if (cast.has_value()) {
    check(cast->scalar_type() == ScalarType::Float && cast->dim() == 2 && cast->stride(1) == 1 &&
              cast->get_device_index() == device,
          "_down_sm90: cast must be a float32 matrix with contiguous rows on x's device");
    params.cast = cast->const_data_ptr<float>();
    params.cast_rows = cast->size(0);
    params.cast_cols = cast->size(1);
    params.cast_pitch = cast->stride(0);
    params.cast_out_pitch = ceil_div(cast->size(1), 8) * 8;
    rounded = new_empty({cast->size(0), params.cast_out_pitch}, x.scalar_type(), x);
    params.cast_out = rounded.mutable_data_ptr();
  }
  DownConfig config{};
  config.wait = true;
  params.workspace_bytes = down_sm90_workspace(params, config);
  const Tensor workspace = new_empty({params.workspace_bytes}, ScalarType::Byte, x);
  params.workspace = params.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  down_sm90(params, config, current_stream(device));
  return {h, words, rounded};
}

// d_a [rank, k], d_b [n, rank], d_bias [n]; shape [0] for what was not asked.
std::tuple<Tensor, Tensor, Tensor> wgrad(OptionalTensor x, OptionalTensor g, OptionalTensor dy,
                                         OptionalTensor h, OptionalTensor words, int64_t rank,
                                         bool float_a, bool float_b, bool bias) {
  check(x.has_value() == g.has_value() && dy.has_value() == h.has_value() &&
            (x.has_value() || dy.has_value()),
        "_wgrad_sm90: x comes with g, dy with h, and one pair must be there");
  const Tensor& like = x.has_value() ? *x : *dy;
  WgradParams params{};
  params.half = is_half(like);
  check(like.dim() == 2 && like.size(0) > 0 && rank > 0,
        "_wgrad_sm90: there must be rows and a rank");
  params.m = like.size(0);
  params.rank = rank;
  const auto type = [&](bool wide) { return wide ? ScalarType::Float : like.scalar_type(); };
  const auto grad = [&](bool wide) {
    return wide ? GradType::kFloat32 : params.half ? GradType::kFloat16 : GradType::kBfloat16;
  };
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor d_a = new_empty({0}, like.scalar_type(), like), d_b = d_a, d_bias = d_a;
  if (x.has_value()) {
    params.k = x->size(1);
    check(params.k > 0, "_wgrad_sm90: x must have columns");
    params.x_pitch = pitch_of("_wgrad_sm90: x", *x, like);
    params.x = x->const_data_ptr();
    params.g_pitch = pitch_of("_wgrad_sm90: g", *g, like);
    params.g = g->const_data_ptr();
    check(g->size(0) == params.m && g->size(1) >= rank, "_wgrad_sm90: g must be [m, rank]");
    if (words.has_value()) {
      check(words->is_contiguous() && words->dim() == 2 &&
                words->scalar_type() == ScalarType::Int && words->get_device_index() == device &&
                words->size(0) == 8 * ceil_div(params.m, 32) &&
                words->size(1) == ceil_div(params.k, 8),
            "_wgrad_sm90: words must be the contiguous mask of x");
      params.words = reinterpret_cast<const uint32_t*>(words->const_data_ptr<int32_t>());
    }
    d_a = new_empty({rank, params.k}, type(float_a), like);
    params.d_a = d_a.mutable_data_ptr();
    params.type_a = grad(float_a);
  }
  if (dy.has_value()) {
    params.n = dy->size(1);
    check(params.n > 0, "_wgrad_sm90: dy must have columns");
    params.dy_pitch = pitch_of("_wgrad_sm90: dy", *dy, like);
    params.dy = dy->const_data_ptr();
    params.h_pitch = pitch_of("_wgrad_sm90: h", *h, like);
    params.h = h->const_data_ptr();
    check(h->size(0) == dy->size(0) && dy->size(0) == params.m && h->size(1) >= rank,
          "_wgrad_sm90: dy and h must be [m, n] and [m, rank]");
    d_b = new_empty({params.n, rank}, type(float_b), like);
    params.d_b = d_b.mutable_data_ptr();
    params.type_b = grad(float_b);
    if (bias) {
      d_bias = new_empty({params.n}, like.scalar_type(), like);
      params.d_bias = d_bias.mutable_data_ptr();
      params.type_bias = grad(false);
    }
  }
  WgradConfig config{};
  config.wait = true;
  params.workspace_bytes = wgrad_sm90_workspace(params, config);
  const Tensor workspace = new_empty({params.workspace_bytes}, ScalarType::Byte, like);
  params.workspace = params.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  wgrad_sm90(params, config, current_stream(device));
  return {d_a, d_b, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("_down_sm90", TORCH_BOX(&down));
  m.impl("_wgrad_sm90", TORCH_BOX(&wgrad));
}

}  // namespace
}  // namespace fastlora
