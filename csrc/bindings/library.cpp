// Every op of the library, one schema a line. Ops whose name starts with an underscore are private:
// fastlora/functional.py holds the public functions. A fragment, because fastlora/ops defines
// further ops of the same namespace from Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  // int32 [8 ceil(rows / 32), ceil(cols / 8)]: the mask words of the dropout state int64 [2] (seed,
  // offset), which keeps keep / 65536 of the elements
  m.def("_dropout_mask(Tensor rng_state, int rows, int cols, int keep) -> Tensor");
}
