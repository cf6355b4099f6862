// Family "lora": the frozen linear and everything low-rank around it, in one launch a direction.
//
//   forward   h = s x A^T            y  = x W^T + bias + h B^T
//   backward  g = s dY B             dX = dY W + g A
//             dB = dY^T h            dbias = sum over m of dY          dA = g^T x
//
// The product is family "gemm"; what is skinny is made beside it, by warps that would be idle.
#pragma once

#include <array>
#include <cstdint>

#include "gemm/gemm.h"
#include "wgrad/wgrad.h"

namespace fastlora {

struct LoraParams {
  // x, w, h, l, y as the product names them: backward x is dY, h is g, l is A and y is dX. h is
  // written, without a gap between rows; l is read in the type of x, where a cast may leave it.
  // m, n, k and rank multiples of 8 (m: any), rank 8 .. 512.
  GemmParams gemm;

  const void* factor;  // A [rank, k], backward B [k, rank] (its n is the product's k), of x's type
  int64_t factor_pitch;  // elements, a multiple of 8
  float scale = 1;
  const float* scaling = nullptr;  // a further factor, on the device

  // fp32 factors [elements] without gaps: rounded to factor and gemm.l first.
  struct Cast {
    const float* from = nullptr;
    void* to = nullptr;
    int64_t elements = 0;
  };
  Cast casts[2];

  // Backward: out of x [m, n], h of the forward pass [m, rank]; null what is not asked for.
  const void* x = nullptr;
  int64_t x_pitch = 0;
  void* d_a = nullptr;  // [rank, n]
  GradType type_a = GradType::kFloat32;
  const void* h = nullptr;
  int64_t h_pitch = 0;
  void* d_b = nullptr;  // [k, rank]
  GradType type_b = GradType::kFloat32;
  void* d_bias = nullptr;  // [k]
  GradType type_bias = GradType::kFloat32;

  // Dropout of x on its way to h; the gradients by the same mask. The state [2], rng_stride apart,
  // or null. Ranks up to 64 then.
  const int64_t* rng_state = nullptr;
  int64_t rng_stride = 1;
  uint32_t keep = 0;          // of 65536
  uint32_t* words = nullptr;  // LoraSizes.words of memory for the mask

  // Forward without dropout: y = bias + columns o (x W^T + h B^T), and what is scaled where z is
  // asked for (DoRA, whose magnitudes' gradient needs it).
  const float* columns = nullptr;  // [n], at a multiple of 8 bytes
  void* z = nullptr;               // [m, n] of x's type, without gaps, at a multiple of 16

  bool one_read = true;  // g and dB of one read of dY, up to 16 ranks
  bool beside = true;    // passes over memory beside the tiles

  void* workspace = nullptr;  // for partial sums, a multiple of 16
  // All zero before the launch. Launches that may run at the same time need different ones.
  uint32_t* counters = nullptr;
  uint32_t* used = nullptr;  // of launches that are over: the kernel zeroes these
  int64_t used_count = 0;
};

struct LoraSizes {
  int64_t workspace_bytes, counters, words;
};
LoraSizes lora_sm90_sizes(const LoraParams& params, const GemmConfig& config);

// Throws std::invalid_argument for what the kernel does not take, std::runtime_error when CUDA
// fails.
void lora_sm90(const LoraParams& params, const GemmConfig& config, CUstream_st* stream);

}  // namespace fastlora
