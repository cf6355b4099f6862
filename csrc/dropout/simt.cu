// words[m, a] = keep_bits(state, m, a), on any CUDA GPU.
//
// One thread makes one word (32 columns of a row, four Philox calls) and stores it; a block covers
// 8 rows x 32 words and strides over the rest of the grid. Any rows, any columns. No shared memory.
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
  const int64_t word_step = int64_t{gridDim.x} * kBlockWords;
  for (int64_t row = int64_t{blockIdx.y} * kBlockRows + threadIdx.y; row < params.rows;
       row += row_step) {
    for (int64_t word = int64_t{blockIdx.x} * kBlockWords + threadIdx.x; word < params.pitch;
         word += word_step) {
      params.words[row * params.pitch + word] = keep_bits(seed, offset, static_cast<uint32_t>(row),
                                                          static_cast<uint32_t>(word), params.keep);
    }
  }
}

}  // namespace

void dropout_mask_cuda(const DropoutMask& params, CUstream_st* stream) {
  if (params.rows == 0 || params.pitch == 0) return;
  const dim3 block(kBlockWords, kBlockRows);
  const dim3 grid(std::min(ceil_div(params.pitch, kBlockWords), kMaxBlocks),
                  std::min(ceil_div(params.rows, kBlockRows), kMaxBlocks));
  dropout_mask_kernel<<<grid, block, 0, stream>>>(params);
  check_launch("dropout_mask");
}

}  // namespace fastlora
