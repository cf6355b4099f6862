// Family "wgrad": the gradients of the low-rank factors, one pass over each wide activation.
//
//   d_a [rank, k] = g [m, rank]^T drop(x) [m, k]
//   d_b [n, rank] = dy [m, n]^T h [m, rank]        d_bias [n] = sum over m of dy
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

enum class GradType { kFloat32, kBfloat16, kFloat16 };

struct WgradParams {
  int64_t m, rank;    // each at least 1; m below 2^31, rank at most 4096
  bool half = false;  // fp16 instead of bf16: x, g, dy, h

  // Inputs have contiguous rows: addresses are multiples of 16, pitches (elements) of 8.
  // First product, or d_a = null.
  int64_t k = 0;
  const void* x = nullptr;
  int64_t x_pitch = 0;
  const void* g = nullptr;
  int64_t g_pitch = 0;
  // The mask of x (common/philox.cuh), [8 ceil(m / 32), ceil(k / 8)], or null.
  const uint32_t* words = nullptr;
  void* d_a = nullptr;  // contiguous, like the other results
  GradType type_a = GradType::kFloat32;

  // Second product, or d_b = null.
  int64_t n = 0;
  const void* dy = nullptr;
  int64_t dy_pitch = 0;
  const void* h = nullptr;
  int64_t h_pitch = 0;
  void* d_b = nullptr;
  GradType type_b = GradType::kFloat32;
  void* d_bias = nullptr;  // rides on the second product, or null
  GradType type_bias = GradType::kFloat32;

  // Device memory for partial sums, wgrad_sm90_workspace() bytes (0 when k + n fills the GPU),
  // address a multiple of 16. Its contents matter only during the call.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct WgradConfig {
  // 0: chosen.
  int stages = 0;     // of the ring, 2 .. 8
  int splits = 0;     // runs of m, each summed by CTAs of its own, 1 .. 32
  bool wait = false;  // launched as dependent: waits for the kernels before it before it reads
};

// Bytes of workspace that a call needs on the current device; depends on m, k, n, rank, which
// results are asked for, and config.
int64_t wgrad_sm90_workspace(const WgradParams& params, const WgradConfig& config);

// Throws std::invalid_argument for what the kernel does not take, std::runtime_error when CUDA
// fails. Launches on the current device.
void wgrad_sm90(const WgradParams& params, const WgradConfig& config, CUstream_st* stream);

}  // namespace fastlora
