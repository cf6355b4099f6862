// Family "down": the low-rank products that read a wide activation once.
//
//   out [m, rank] = scale * [scaling] * drop(x) [m, k] l^T        l logically [rank, k]
//
// forward: h, with l = A [rank, k]. backward: g, with x = dY, l = B^T (B is [k, rank], contiguous).
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

struct DownParams {
  int64_t m, k, rank;  // each at least 1; m and k below 2^31, rank at most 4096
  bool half = false;   // fp16 instead of bf16: x, out, and l unless l_float

  const void* x;  // rows contiguous; address a multiple of 16, pitch (elements) of 8
  int64_t x_pitch;
  const void* l;  // any strides (elements); fast when one of them is 1
  bool l_float = false;
  int64_t l_stride_rank, l_stride_k;
  void* out;  // columns rank .. out_pitch - 1 are written as zero
  int64_t out_pitch;

  float scale = 1;
  const float* scaling = nullptr;  // a factor in device memory, or null

  // Dropout (common/philox.cuh), where rng_state is not null: of x, or, where words is not null, of
  // nothing here: then the mask of a matrix [m, emit_cols] is left in words [8 ceil(m / 32),
  // ceil(emit_cols / 8)].
  const int64_t* rng_state = nullptr;
  int64_t rng_stride = 1;
  uint32_t keep = 65536;
  uint32_t* words = nullptr;
  int64_t emit_cols = 0;

  // A matrix [cast_rows, cast_cols] rounded from fp32 on the side, or null. Columns cast_cols ..
  // cast_out_pitch - 1 become zero.
  const float* cast = nullptr;
  int64_t cast_rows = 0, cast_cols = 0, cast_pitch = 0;
  void* cast_out = nullptr;  // of the type of out; address a multiple of 16, pitch of 8
  int64_t cast_out_pitch = 0;

  // Device memory for partial sums, down_sm90_workspace() bytes (0 when m fills the GPU), address a
  // multiple of 16. Its contents matter only during the call.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct DownConfig {
  // 0: chosen.
  int stages = 0;      // of the ring, 2 .. 8
  int splits = 0;      // runs of k, each summed by CTAs of its own, 1 .. 32
  int rank_block = 0;  // 16, 32, 64, 128
  bool wait = false;   // launched as dependent: waits for the kernels before it before it reads
};

// Bytes of workspace that a call needs on the current device; depends on m, k, rank, and config.
int64_t down_sm90_workspace(const DownParams& params, const DownConfig& config);

// Throws std::invalid_argument for what the kernel does not take, std::runtime_error when CUDA
// fails. Launches on the current device.
void down_sm90(const DownParams& params, const DownConfig& config, CUstream_st* stream);

}  // namespace fastlora
