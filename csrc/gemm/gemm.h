// Family "gemm": the frozen linear with the low-rank product inside it.
//
//   forward   y [m, n] = x [m, k] w^T + bias + h [m, rank] l^T      w [n, k], l [n, rank]
//   backward  y [m, n] = x [m, k] w + bias + h [m, rank] l          w [k, n], l [rank, n]
//
// All matrices are bf16 or fp16 with contiguous rows. Sums are fp32, rounded once.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

struct GemmParams {
  int64_t m, n, k;          // each at least 1; n a multiple of 8
  int64_t rank = 0;         // 0: h and l are not read
  bool half = false;        // fp16 instead of bf16
  bool w_mn_major = false;  // w is [k, n] and l [rank, n] (backward), not [n, k], [n, rank]

  // Pitches are in elements, between rows: multiples of 8. Addresses are multiples of 16.
  const void* x;
  int64_t x_pitch;
  const void* w;
  int64_t w_pitch;
  const void* h = nullptr;
  int64_t h_pitch = 0;
  const void* l = nullptr;
  int64_t l_pitch = 0;
  void* y;
  int64_t y_pitch;

  const void* bias = nullptr;  // [n], of the same type; its address a multiple of 4

  // Dropout of the low-rank product, or null: the words of common/philox.cuh,
  // [8 ceil(m / 32), ceil(n / 8)]. Dropped elements contribute nothing; no scale is applied.
  const uint32_t* mask = nullptr;
  int64_t mask_pitch = 0;
};

struct GemmConfig {
  int block_m = 128, block_n = 256;  // a tile of FASTLORA_GEMM_TILES in sm90.cu
  int cluster_m = 1, cluster_n = 1;  // CTAs that share w (cluster_m) or x (cluster_n): 1 or 2
  int group_m = 16;                  // block rows walked together, so that they share w in L2
  int num_sms = 132;
};

// SMs of a device, asked once.
int multiprocessors(int device);

// Throws std::invalid_argument for what the kernel does not take, std::runtime_error when CUDA
// fails.
void gemm_sm90(const GemmParams& params, const GemmConfig& config, CUstream_st* stream);

}  // namespace fastlora
