// Every op of the library, one schema a line. Ops whose name starts with an underscore are private:
// fastlora/functional.py holds the public functions. A fragment, because fastlora/ops defines
// further ops of the same namespace from Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  // int32 [8 ceil(rows / 32), ceil(cols / 8)]: the mask words of the dropout state int64 [2] (seed,
  // offset), which keeps keep / 65536 of the elements
  m.def("_dropout_mask(Tensor rng_state, int rows, int cols, int keep) -> Tensor");
  // y [m, n] = x [m, k] w^T + bias + drop(h [m, r] l^T), w [n, k] and l [n, r] contiguous along
  // either dimension, but both alike; words the mask of y, config a TileConfig (planned when none
  // is given)
  m.def(
      "_gemm_sm90(Tensor x, Tensor w, Tensor? h, Tensor? l, Tensor? bias, Tensor? words, int[]? "
      "config) -> Tensor");
  // h [m, r up to 8] = scale [scaling] drop(x [m, k]) l [r, k]^T, the mask words of [m, emit_cols],
  // and cast (float32) in x's dtype
  m.def(
      "_down_sm90(Tensor x, Tensor l, Tensor? scaling, float scale, Tensor? rng_state, int keep, "
      "int "
      "emit_cols, Tensor? cast) -> (Tensor, Tensor, Tensor)");
  // d_a [rank, k] = g^T drop(x), d_b [n, rank] = dy^T h, d_bias [n] = sum_m dy
  m.def(
      "_wgrad_sm90(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, Tensor? words, int rank, bool "
      "float_a, "
      "bool float_b, bool bias) -> (Tensor, Tensor, Tensor)");
  // y [m, n] and h [m, r] = scale [scaling] drop(x) a^T; a [r, k] and b [n, r] in x's dtype or
  // float32; rng_state and keep as above; config as above
  m.def(
      "_lora_forward_sm90(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, "
      "float scale, Tensor? rng_state, int keep, int[]? config) -> (Tensor, Tensor)");
  // the same without dropout, y = bias + columns o z with a factor for every column, float32 [n],
  // and z [m, n] = x w^T + h b^T rounded, or shape [0]
  m.def(
      "_lora_scaled_sm90(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, "
      "float scale, Tensor columns, bool with_z, int[]? config) -> (Tensor, Tensor, Tensor)");
  // as _lora_forward_sm90 for few rows, without dropout and for r up to 64; backward x is dy, y dx
  // and h g = scale [scaling] dy b; config is a FewConfig of few.h
  m.def(
      "_lora_few_sm90(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? scaling, float "
      "scale, bool backward, int[]? config) -> (Tensor, Tensor)");
  // dx [m, k], d_a [r, k] where x is given, d_b [n, r] where h is, d_bias [n] (in float32, or dy's
  // dtype)
  m.def(
      "_lora_backward_sm90(Tensor dy, Tensor w, Tensor a, Tensor b, Tensor? x, Tensor? h, Tensor? "
      "scaling, float scale, Tensor? rng_state, int keep, bool bias, bool float_bias, int[]? "
      "config) -> (Tensor, Tensor, Tensor, Tensor)");
  // codes [ceil(n / 2)] and absmax [ceil(n / block_size)] of a weight of n elements, NF4
  m.def("_nf4_quantize(Tensor weight, int block_size) -> (Tensor, Tensor)");
  // codes [n] and absmax [ceil(n / block_size)] of n scales; code [256] float32, sorted
  m.def("_nf4_quantize_scales(Tensor values, Tensor code, int block_size) -> (Tensor, Tensor)");
  // elements begin and up of the weight, as many as out holds, into out; absmax in float32, or
  // codes in uint8 with nested_absmax, nested_code and offset
  m.def(
      "_nf4_dequantize(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
      "Tensor? offset, int block_size, int nested_block_size, bool fp4, int begin, Tensor(a!) out) "
      "-> Tensor(a!)");
  // y [m, n] and h [m, r] (shape [0] without a), as _lora_forward_sm90 makes them, over a weight
  // [n, k] in 4 bits, of few rows or of any: up to 16 ranks, or where h is given any
  m.def(
      "_nf4_linear_sm80(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_code, Tensor? offset, int n, int block_size, int nested_block_size, bool fp4, "
      "Tensor? a, Tensor? b, Tensor? h, Tensor? bias, Tensor? scaling, float scale, int? "
      "shared_bytes) -> (Tensor, Tensor)");
  m.def(
      "_nf4_linear_sm90(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_code, Tensor? offset, int n, int block_size, int nested_block_size, bool fp4, "
      "Tensor? a, Tensor? b, Tensor? h, Tensor? bias, Tensor? scaling, float scale, int[]? config) "
      "-> (Tensor, Tensor)");
  // dx [m, k] = dy [m, n] w + g a, of such a weight; a [r, k] and g [m, r] are given, or neither
  m.def(
      "_nf4_dx_sm90(Tensor dy, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_code, Tensor? offset, int k, int block_size, int nested_block_size, bool fp4, "
      "Tensor? a, Tensor? g, int[]? config) -> Tensor");
}
