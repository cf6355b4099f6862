// fastlora::_nf4_quantize, _nf4_quantize_scales, _nf4_dequantize, _nf4_linear_sm80,
// _nf4_linear_sm90 and _nf4_dx_sm90: checks, allocation, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "host/stream.h"
#include "nf4/linear.h"
#include "nf4/nf4.h"

namespace fastlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 14;  // elements of a thread on the CPU

FloatType float_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::BFloat16:
      return FloatType::kBfloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      check(false, op, ": takes float32, bfloat16 and float16");
  }
  return {};
}

int shift_of(const char* name, int64_t block_size, int64_t least) {
  check(block_size >= least && block_size <= 4096 && (block_size & (block_size - 1)) == 0,
        "_nf4: ", name, " must be a power of two from ", least, " to 4096, got ", block_size);
  int shift = 0;
  while (int64_t{1} << shift < block_size) ++shift;
  return shift;
}

// A contiguous tensor of `count` elements or more, on `like`'s device.
void check_flat(const char* name, const Tensor& t, ScalarType type, int64_t count,
                const Tensor& like) {
  check(t.scalar_type() == type && t.is_contiguous() && t.numel() >= count &&
            t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
        "_nf4: ", name,
        " must be contiguous, of the right dtype, on one device with the others "
        "and have ",
        count, " elements, got ", t.numel());
}

template <class OnCpu, class OnCuda>
void run(const Tensor& like, int64_t first, int64_t last, int64_t block_size, OnCpu on_cpu,
         [[maybe_unused]] OnCuda on_cuda) {
  if (!like.is_cuda()) {
    torch::stable::parallel_for(first, last, std::max<int64_t>(1, kGrain / block_size), on_cpu);
    return;
  }
#ifdef FASTLORA_WITH_CUDA
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  on_cuda(current_stream(device));
#endif
}

// Codes [ceil(n / 2)] and absmax [ceil(n / block_size)] of a weight of n elements.
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t block_size) {
  shift_of("block_size", block_size, 32);
  check(weight.is_contiguous(), "_nf4_quantize: weight must be contiguous");
  Nf4Quantize p{};
  p.weight = weight.const_data_ptr();
  p.type = float_type("_nf4_quantize", weight);
  p.count = weight.numel();
  p.block_size = block_size;
  const int64_t blocks = ceil_div(p.count, block_size);
  const Tensor codes = new_empty({ceil_div(p.count, 2)}, ScalarType::Byte, weight);
  const Tensor absmax = new_empty({blocks}, ScalarType::Float, weight);
  p.codes = codes.mutable_data_ptr<uint8_t>();
  p.absmax = absmax.mutable_data_ptr<float>();
  run(
      weight, 0, blocks, block_size, [&](int64_t a, int64_t b) { nf4_quantize_cpu(p, a, b); },
      [&](auto* stream) { nf4_quantize_cuda(p, stream); });
  return {codes, absmax};
}

// Codes and absmax of scales less their offset.
std::tuple<Tensor, Tensor> quantize_scales(const Tensor& values, const Tensor& code,
                                           int64_t block_size) {
  shift_of("the scales' block_size", block_size, 1);
  check_flat("the scales", values, ScalarType::Float, 0, values);
  check_flat("their code", code, ScalarType::Float, 256, values);
  ScaleQuantize p{};
  p.values = values.const_data_ptr<float>();
  p.code = code.const_data_ptr<float>();
  p.count = values.numel();
  p.block_size = block_size;
  const int64_t blocks = ceil_div(p.count, block_size);
  const Tensor codes = new_empty({p.count}, ScalarType::Byte, values);
  const Tensor absmax = new_empty({blocks}, ScalarType::Float, values);
  p.codes = codes.mutable_data_ptr<uint8_t>();
  p.absmax = absmax.mutable_data_ptr<float>();
  run(
      values, 0, blocks, block_size, [&](int64_t a, int64_t b) { scale_quantize_cpu(p, a, b); },
      [&](auto* stream) { scale_quantize_cuda(p, stream); });
  return {codes, absmax};
}

// The scales of a weight of `blocks` blocks.
Nf4Scales scales_of(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                    const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t blocks,
                    int64_t nested_block_size) {
  Nf4Scales scales{};
  if (!nested_absmax.has_value()) {
    check_flat("absmax", absmax, ScalarType::Float, blocks, codes);
    scales.absmax = absmax.const_data_ptr<float>();
    return scales;
  }
  check(nested_code.has_value() && offset.has_value(),
        "_nf4: nested_absmax, nested_code and offset come together");
  scales.nested_shift = shift_of("nested_block_size", nested_block_size, 1);
  check_flat("absmax", absmax, ScalarType::Byte, blocks, codes);
  check_flat("nested_absmax", *nested_absmax, ScalarType::Float,
             ceil_div(blocks, nested_block_size), codes);
  check_flat("nested_code", *nested_code, ScalarType::Float, 256, codes);
  check_flat("offset", *offset, ScalarType::Float, 1, codes);
  scales.codes = absmax.const_data_ptr<uint8_t>();
  scales.nested_absmax = nested_absmax->const_data_ptr<float>();
  scales.nested_code = nested_code->const_data_ptr<float>();
  scales.offset = offset->const_data_ptr<float>();
  return scales;
}

// Elements begin .. begin + out.numel() of the weight, into `out`, which comes back.
Tensor dequantize(const Tensor& codes, const Tensor& absmax, OptionalTensor nested_absmax,
                  OptionalTensor nested_code, OptionalTensor offset, int64_t block_size,
                  int64_t nested_block_size, bool fp4, int64_t begin, const Tensor& out) {
  Nf4Dequantize p{};
  p.block_shift = shift_of("block_size", block_size, 32);
  p.begin = begin;
  p.count = out.numel();
  p.fp4 = fp4;
  p.type = float_type("_nf4_dequantize", out);
  check(begin >= 0 && begin % 2 == 0, "_nf4_dequantize: begin must be even, got ", begin);
  const int64_t end = begin + p.count, blocks = ceil_div(end, block_size);
  check_flat("out", out, out.scalar_type(), 0, codes);
  check_flat("codes", codes, ScalarType::Byte, ceil_div(end, 2), codes);
  p.codes = codes.const_data_ptr<uint8_t>();
  p.out = out.mutable_data_ptr();
  p.scales =
      scales_of(codes, absmax, nested_absmax, nested_code, offset, blocks, nested_block_size);
  run(
      codes, begin / block_size, p.count == 0 ? begin / block_size : blocks, block_size,
      [&](int64_t a, int64_t b) { nf4_dequantize_cpu(p, a, b); },
      [&](auto* stream) { nf4_dequantize_cuda(p, stream); });
  return out;
}

#ifdef FASTLORA_WITH_SM80
bool aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

// A factor [rows, cols] of x's dtype or float32, contiguous.
const void* factor(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols,
                   const Tensor& x) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.is_contiguous() &&
            (t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float) &&
            t.get_device_index() == x.get_device_index(),
        op, ": ", name, " must be a contiguous [", rows, ", ", cols,
        "] of x's dtype or float32, on x's device");
  return t.const_data_ptr();
}

// Columns of the matrix that meets the weight.
int64_t columns_of(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 2 &&
            (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half),
        op, ": ", name, " must be a matrix of bfloat16 or float16");
  return x.size(1);
}

// x and a weight [n, k], of which x has the rows or the columns. Without an update, y and h.
Nf4Linear product_of(const char* op, const char* name, const Tensor& x, const Tensor& codes,
                     const Tensor& absmax, const OptionalTensor& nested_absmax,
                     const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t n,
                     int64_t k, int64_t block_size, int64_t nested_block_size, bool fp4) {
  Nf4Linear p{};
  p.m = x.size(0);
  p.n = n;
  p.k = k;
  p.half = x.scalar_type() == ScalarType::Half;
  constexpr int64_t kMost = int64_t{1} << 30;
  check(p.m >= 1 && p.m < kMost && n >= 1 && n < kMost && k >= 64 && k % 64 == 0 && k < kMost &&
            n * (k / 64) < 2 * kMost,
        op, ": takes 1 row and more and multiples of 64 columns, below 2^30, of a weight of fewer ",
        "than 2^37 elements; got ", p.m, " rows, ", k, " columns and a weight of ", n, " rows");
  p.x_pitch = pitch_of(op, name, x, p.m, x.size(1), x);
  p.x = x.const_data_ptr();
  p.block_shift = shift_of("block_size", block_size, 64);
  check(k % block_size == 0, op, ": rows must be whole blocks");
  check_flat("codes", codes, ScalarType::Byte, n * k / 2, x);
  check(codes.numel() == n * k / 2, op, ": codes are of another weight than [", n, ", ", k, "]");
  p.codes = codes.const_data_ptr<uint8_t>();
  p.fp4 = fp4;
  p.scales = scales_of(codes, absmax, nested_absmax, nested_code, offset, n * k / block_size,
                       nested_block_size);
  check(aligned(p.x, 16) && p.x_pitch % 8 == 0 && aligned(p.codes, 16), op, ": ", name,
        ", its rows and codes must start at multiples of 16 bytes");
  return p;
}

// What both linears take: y [m, n] and h [m, rank] of x [m, k] and a weight [n, k]. Without a, h
// comes from outside. All but y and h themselves is in the result.
Nf4Linear linear_of(const char* op, const Tensor& x, const Tensor& codes, const Tensor& absmax,
                    const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                    const OptionalTensor& offset, int64_t n, int64_t block_size,
                    int64_t nested_block_size, bool fp4, const OptionalTensor& a,
                    const OptionalTensor& b, const OptionalTensor& bias,
                    const OptionalTensor& scaling, double scale) {
  Nf4Linear p = product_of(op, "x", x, codes, absmax, nested_absmax, nested_code, offset, n,
                           columns_of(op, "x", x), block_size, nested_block_size, fp4);
  if (a.has_value()) {
    check(a->dim() == 2 && b.has_value(), op, ": lora_A must be a matrix, and have lora_B");
    p.rank = a->size(0);
    check(p.rank >= 1 && p.rank <= kMostNf4Ranks, op, ": makes h of up to ", kMostNf4Ranks,
          " ranks, got ", p.rank);
    p.a = factor(op, "lora_A", *a, p.rank, p.k, x);
    p.a_float = a->scalar_type() == ScalarType::Float;
  }
  if (b.has_value()) {
    check(b->dim() == 2, op, ": lora_B must be a matrix");
    if (!a.has_value()) p.rank = b->size(1);
    check(p.rank <= 4096, op, ": takes ranks up to 4096, got ", p.rank);
    p.b = factor(op, "lora_B", *b, n, p.rank, x);
    p.b_float = b->scalar_type() == ScalarType::Float;
  }
  check(aligned(p.a, 16), op, ": lora_A must start at a multiple of 16 bytes");
  if (bias.has_value()) {
    check_flat("bias", *bias, x.scalar_type(), n, x);
    p.bias = bias->const_data_ptr();
  }
  p.scale = static_cast<float>(scale);
  if (scaling.has_value()) {
    check_flat("scaling", *scaling, ScalarType::Float, 1, x);
    p.scaling = scaling->const_data_ptr<float>();
  }
  return p;
}

// y and the h that the kernels make (shape [0] where they make none).
std::tuple<Tensor, Tensor> outputs(Nf4Linear& p, const Tensor& x) {
  const Tensor y = new_empty({p.m, p.n}, x.scalar_type(), x);
  p.y = y.mutable_data_ptr();
  if (p.a == nullptr) return {y, new_empty({0}, x.scalar_type(), x)};
  const Tensor h = new_empty({p.m, p.rank}, x.scalar_type(), x);
  p.h = h.mutable_data_ptr();
  return {y, h};
}

// An h or g that comes from outside.
void take_h(const char* op, const char* name, const Tensor& h, const Tensor& x, Nf4Linear& p) {
  check_flat(name, h, x.scalar_type(), p.m * p.rank, x);
  check(h.numel() == p.m * p.rank, op, ": ", name, " must be [", p.m, ", ", p.rank, "]");
  p.h = const_cast<void*>(h.const_data_ptr());
}

// Likewise, where there is one; lora_B comes with lora_A or with it.
void take_h(const char* op, Nf4Linear& p, const Tensor& x, const OptionalTensor& a,
            const OptionalTensor& b, const OptionalTensor& h) {
  check(b.has_value() == (a.has_value() != h.has_value()), op,
        ": lora_B comes with lora_A or with h");
  if (h.has_value()) take_h(op, "h", *h, x, p);
}

std::tuple<Tensor, Tensor> linear_sm80(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                       OptionalTensor nested_absmax, OptionalTensor nested_code,
                                       OptionalTensor offset, int64_t n, int64_t block_size,
                                       int64_t nested_block_size, bool fp4, OptionalTensor a,
                                       OptionalTensor b, OptionalTensor h, OptionalTensor bias,
                                       OptionalTensor scaling, double scale,
                                       std::optional<int64_t> shared_bytes) {
  constexpr auto kOp = "_nf4_linear_sm80";
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Nf4Linear p = linear_of(kOp, x, codes, absmax, nested_absmax, nested_code, offset, n, block_size,
                          nested_block_size, fp4, a, b, bias, scaling, scale);
  check(p.m <= kMostNf4Rows, kOp, ": takes up to ", kMostNf4Rows, " rows, got ", p.m);
  auto result = outputs(p, x);
  take_h(kOp, p, x, a, b, h);
  const int64_t most = shared_bytes.value_or(0);
  check(most == 0 || (most >= 99 * 1024 && most <= 1 << 20), kOp,
        ": shared_bytes must be 99 KiB or more, got ", most);
  nf4_linear_sm80(p, static_cast<int>(most), current_stream(device));
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("_nf4_linear_sm80", TORCH_BOX(&linear_sm80));
}
#endif

#ifdef FASTLORA_WITH_SM90
using Config = std::optional<std::vector<int64_t>>;

Nf4Config config_of(const char* op, const Config& config) {
  if (!config.has_value()) return {};
  check(config->size() == 2 && (*config)[0] >= 0 && (*config)[0] <= 256 && (*config)[1] >= 0 &&
            (*config)[1] <= 8,
        op, ": config must be [rows, splits], rows up to 256 and splits up to 8");
  return {static_cast<int>((*config)[0]), static_cast<int>((*config)[1])};
}

// h [m, rank] (g backward) that is made elsewhere.
std::tuple<Tensor, Tensor> linear_sm90(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                       OptionalTensor nested_absmax, OptionalTensor nested_code,
                                       OptionalTensor offset, int64_t n, int64_t block_size,
                                       int64_t nested_block_size, bool fp4, OptionalTensor a,
                                       OptionalTensor b, OptionalTensor h, OptionalTensor bias,
                                       OptionalTensor scaling, double scale, Config config) {
  constexpr auto kOp = "_nf4_linear_sm90";
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Nf4Linear p = linear_of(kOp, x, codes, absmax, nested_absmax, nested_code, offset, n, block_size,
                          nested_block_size, fp4, a, b, bias, scaling, scale);
  check(p.m == 1 || p.x_pitch >= p.k, kOp, ": rows of x must not overlap");
  auto result = outputs(p, x);
  take_h(kOp, p, x, a, b, h);
  nf4_linear_sm90(p, config_of(kOp, config), current_stream(device));
  return result;
}

// dX [m, k] = dY [m, n] W + g a of a weight [n, k].
Tensor dx_sm90(const Tensor& dy, const Tensor& codes, const Tensor& absmax,
               OptionalTensor nested_absmax, OptionalTensor nested_code, OptionalTensor offset,
               int64_t k, int64_t block_size, int64_t nested_block_size, bool fp4, OptionalTensor a,
               OptionalTensor g, Config config) {
  constexpr auto kOp = "_nf4_dx_sm90";
  const int32_t device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t n = columns_of(kOp, "dy", dy);
  Nf4Linear p = product_of(kOp, "dy", dy, codes, absmax, nested_absmax, nested_code, offset, n, k,
                           block_size, nested_block_size, fp4);
  check(p.m == 1 || p.x_pitch >= n, kOp, ": rows of dy must not overlap");
  check(a.has_value() == g.has_value(), kOp, ": lora_A comes with g");
  if (a.has_value()) {
    check(a->dim() == 2, kOp, ": lora_A must be a matrix");
    p.rank = a->size(0);
    check(p.rank <= 4096, kOp, ": takes ranks up to 4096, got ", p.rank);
    p.a = factor(kOp, "lora_A", *a, p.rank, k, dy);
    p.a_float = a->scalar_type() == ScalarType::Float;
    check(aligned(p.a, 8), kOp, ": lora_A must start at a multiple of 8 bytes");
    take_h(kOp, "g", *g, dy, p);
  }
  const Tensor dx = new_empty({p.m, k}, dy.scalar_type(), dy);
  p.y = dx.mutable_data_ptr();
  nf4_dx_sm90(p, config_of(kOp, config), current_stream(device));
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("_nf4_linear_sm90", TORCH_BOX(&linear_sm90));
  m.impl("_nf4_dx_sm90", TORCH_BOX(&dx_sm90));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("_nf4_quantize", TORCH_BOX(&quantize));
  m.impl("_nf4_quantize_scales", TORCH_BOX(&quantize_scales));
  m.impl("_nf4_dequantize", TORCH_BOX(&dequantize));
}

#ifdef FASTLORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("_nf4_quantize", TORCH_BOX(&quantize));
  m.impl("_nf4_quantize_scales", TORCH_BOX(&quantize_scales));
  m.impl("_nf4_dequantize", TORCH_BOX(&dequantize));
}
#endif

}  // namespace
}  // namespace fastlora
