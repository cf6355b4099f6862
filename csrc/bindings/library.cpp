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
}
