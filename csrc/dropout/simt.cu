// words[m, c] = keep_bits(state, m, c), on any CUDA GPU.
//
// One thread makes one word (8 columns of 4 rows, up to four Philox calls) and stores it; a block
// covers 8 x 32 words and strides over the rest of the grid. No shared memory.
#include <algorithm>

#include "common/philox.cuh"
#include "dropout/dropout.h"
#include "host/launch.cuh"

namespace fastlora {
namespace {

constexpr int kBlockWords = 32;
constexpr int kBlockRows = 8;
constexpr int64_t kMaxBlocks = 32768;  // an axis of the grid; below the limit of 65,535 of its y

__global__ void __launch_bounds__(kBlockWords* kBlockRows) dropout_mask_kernel(DropoutMask params) {
  const auto seed = static_cast<uint64_t>(params.rng_state[0]);
  const auto offset = static_cast<uint64_t>(params.rng_state[params.rng_stride]);
  const int64_t row_step = int64_t{gridDim.y} * kBlockRows;
  const int64_t col_step = int64_t{gridDim.x} * kBlockWords;
  for (int64_t row = int64_t{blockIdx.y} * kBlockRows + threadIdx.y; row < params.unit_rows;
       row += row_step) {
    for (int64_t col = int64_t{blockIdx.x} * kBlockWords + threadIdx.x; col < params.unit_cols;
         col += col_step) {
      params.words[row * params.unit_cols + col] = keep_bits(
          seed, offset, static_cast<uint32_t>(row), static_cast<uint32_t>(col), params.keep);
    }
  }
}

}  // namespace

void dropout_mask_cuda(const DropoutMask& params, CUstream_st* stream) {
  if (params.unit_rows == 0 || params.unit_cols == 0) return;
  const dim3 block(kBlockWords, kBlockRows);
  const dim3 grid(std::min(ceil_div(params.unit_cols, kBlockWords), kMaxBlocks),
                  std::min(ceil_div(params.unit_rows, kBlockRows), kMaxBlocks));
  dropout_mask_kernel<<<grid, block, 0, stream>>>(params);
  check_launch("dropout_mask");
}

}  // namespace fastlora
