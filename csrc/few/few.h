// Family "few": the frozen linear and its low-rank update for few rows, in one launch.
//
//   forward   h [m, rank] = s x A^T           y [m, n] = x W^T + bias + h B^T
//   backward  g [m, rank] = s dY B           dX [m, n] = dY W + g A
//
// What it costs is reading W once: K is split among the CTAs of a cluster so that all SMs read.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

struct FewParams {
  int64_t m, n, k, rank;  // n, k and rank multiples of 8, rank 8 .. 64
  bool half = false;      // fp16 instead of bf16: x, w, bias, y, h
  // Backward: x is dY, y dX, h g; w is [k, n], a is B [k, rank] and b is A [rank, n].
  bool w_mn_major = false;

  // Pitches are in elements, between rows. Addresses and pitches are multiples of 16 bytes.
  const void* x;  // [m, k]
  int64_t x_pitch;
  const void* w;  // [n, k]
  int64_t w_pitch;
  const void* a;  // [rank, k], of x's type or fp32
  int64_t a_pitch;
  bool a_float = false;
  const void* b;  // [n, rank], the same
  int64_t b_pitch;
  bool b_float = false;
  const void* bias = nullptr;  // [n], its address a multiple of 4

  float scale = 1;
  const float* scaling = nullptr;  // a further factor, on the device

  void* y;  // [m, n] and h [m, rank], without gaps
  void* h;
};

struct FewConfig {
  int columns = 128;  // of a tile: 64 or 128; its rows are 64
  int cluster_m = 1;  // CTAs of 64 rows that share what they read of W: 1, 2 or 4
  int splits = 1;     // CTAs that share K: 1, 2, 4 or 8, and at most 8 with cluster_m
};

// Throws std::invalid_argument for what the kernel does not take, std::runtime_error when CUDA
// fails.
void few_sm90(const FewParams& params, const FewConfig& config, CUstream_st* stream);

}  // namespace fastlora
