// words[m, c] = keep_bits(state, m, c) on the CPU, for a range of words so that the caller can
// spread ranges over threads.
#include <algorithm>

#include "common/philox.cuh"
#include "dropout/dropout.h"

namespace fastlora {

void dropout_mask_cpu(const DropoutMask& params, int64_t begin, int64_t end) {
  const auto seed = static_cast<uint64_t>(params.rng_state[0]);
  const auto offset = static_cast<uint64_t>(params.rng_state[params.rng_stride]);
  while (begin < end) {
    const int64_t first = begin % params.unit_cols;
    const auto row = static_cast<uint32_t>(begin / params.unit_cols);
    const auto count = static_cast<uint32_t>(std::min(end - begin, params.unit_cols - first));
    for (uint32_t i = 0; i < count; ++i) {
      params.words[begin + i] =
          keep_bits(seed, offset, row, static_cast<uint32_t>(first) + i, params.keep);
    }
    begin += count;
  }
}

}  // namespace fastlora
