// Quantises and dequantises NF4 on any CUDA GPU.
//
// dequantize  w = round(value[code] * absmax): a warp turns a span of 1024 elements into floats, by
//             contiguous loads and stores. A lane has the scale of one of the span's blocks, which
//             it hands to the others; quantised scales are resolved on the way. The values lie in
//             shared memory 32 times, a bank for every lane. 3 KB of shared memory. CTAs that stay,
//             and load spans ahead, were slower.
// quantize    a warp a block: its absmax, then its codes, two elements a lane and step
// scales      a warp a block of scales: likewise, by search in 256 codes. 1 KB of shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "host/launch.cuh"
#include "nf4/code.cuh"

namespace fastlora {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8;                     // elements of a thread's store
constexpr int kUnroll = 4;                    // chunks of a thread in a span
constexpr int kSpan = 32 * kChunk * kUnroll;  // elements of a warp
constexpr int64_t kMaxBlocks = int64_t{1} << 16;
constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

template <class T>
__device__ __forceinline__ T rounded(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

__device__ __forceinline__ uint32_t packed(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t packed(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T>
__device__ __forceinline__ void store(T* out, const float (&v)[kChunk]) {
  auto* const to = reinterpret_cast<uint4*>(out);
  if constexpr (std::is_same_v<T, float>) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
    __stcs(reinterpret_cast<float4*>(to) + 1, make_float4(v[4], v[5], v[6], v[7]));
  } else {
    *to = make_uint4(packed(v[0], v[1], T{}), packed(v[2], v[3], T{}), packed(v[4], v[5], T{}),
                     packed(v[6], v[7], T{}));
  }
}

// What a lane loads for a span before it is turned into floats: its codes, and the scale of one of
// the span's blocks, which the others get from it.
struct Loaded {
  uint32_t words[kUnroll];
  float absmax;  // or nested_absmax, of
  uint32_t code;
};

__device__ __forceinline__ Loaded load_span(const Nf4Dequantize& p, int64_t span, int lane) {
  const int64_t first = p.begin + span * kSpan;
  const auto* const codes = reinterpret_cast<const uint32_t*>(p.codes + first / 2) + lane;
  Loaded loaded;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) loaded.words[i] = __ldcs(codes + i * 32);
  const int64_t last_block = (p.begin + p.count - 1) >> p.block_shift;
  const int64_t block = min((first >> p.block_shift) + lane, last_block);
  if (p.scales.absmax != nullptr) {
    loaded.absmax = __ldg(p.scales.absmax + block);
  } else {
    loaded.code = __ldg(p.scales.codes + block);
    loaded.absmax = __ldg(p.scales.nested_absmax + (block >> p.scales.nested_shift));
  }
  return loaded;
}

// Two roundings, as bitsandbytes has them.
__device__ __forceinline__ float scale_of(float nested_code, float nested_absmax, float offset) {
  return __fadd_rn(__fmul_rn(nested_code, nested_absmax), offset);
}

// kAligned: codes suit loads of 4 bytes, out stores of 16, and begin is a multiple of 32.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2048 / kThreads)
    dequantize_kernel(Nf4Dequantize p, CodeBook book) {
  __shared__ float table[16 * 32];
  __shared__ float nested_code[256];
  const int lane = threadIdx.x % 32;
  const int64_t spans = kAligned ? p.count / kSpan : 0;
  const int64_t span = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  Loaded loaded;
  if (kAligned && span < spans) loaded = load_span(p, span, lane);
  const bool nested = p.scales.absmax == nullptr;
  float offset = 0;
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) table[i] = book.value[i / 32];
  if (nested) {
    nested_code[threadIdx.x] = p.scales.nested_code[threadIdx.x];
    offset = *p.scales.offset;
  }
  __syncthreads();
  const float* const values = table + lane;
  auto* const out = static_cast<T*>(p.out);

  if constexpr (kAligned) {
    if (span < spans) {
      const int64_t first = span * kSpan;
      const float own =
          nested ? scale_of(nested_code[loaded.code], loaded.absmax, offset) : loaded.absmax;
      const int in_block = static_cast<int>(p.begin + first) & ((1 << p.block_shift) - 1);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int element = (i * 32 + lane) * kChunk;
        const float scale = __shfl_sync(0xFFFFFFFF, own, (in_block + element) >> p.block_shift);
        float made[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          const uint32_t code = loaded.words[i] >> (j / 2 * 8 + (1 - j % 2) * 4) & 15;
          made[j] = __fmul_rn(values[code * 32], scale);
        }
        store(out + first + element, made);
      }
    }
  }
  for (int64_t i = spans * kSpan + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t at = p.begin + i, block = at >> p.block_shift;
    const uint32_t code = p.codes[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15;
    const float scale =
        nested ? scale_of(nested_code[p.scales.codes[block]],
                          p.scales.nested_absmax[block >> p.scales.nested_shift], offset)
               : p.scales.absmax[block];
    out[i] = rounded<T>(__fmul_rn(values[code * 32], scale));
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, lanes));
  }
  return value;
}

// The reciprocal that bitsandbytes' build (fast math) takes, where it is one.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

template <class T>
__device__ __forceinline__ float get(const Nf4Quantize& p, int64_t i, int64_t end) {
  return i < end ? static_cast<float>(static_cast<const T*>(p.weight)[i]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Nf4Quantize p, int64_t blocks) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t block = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; block < blocks;
       block += warps) {
    const int64_t from = block * p.block_size;
    const int64_t end = min(p.count, from + p.block_size);
    float absmax = 0;  // fmaxf passes NaN over
    for (int64_t i = from + lane; i < end; i += 32)
      absmax = fmaxf(absmax, fabsf(get<T>(p, i, end)));
    absmax = warp_max(absmax);
    if (lane == 0) p.absmax[block] = absmax;
    const float inverse = absmax < FLT_MIN ? 1e38f : reciprocal(absmax);
    for (int64_t i = from + 2 * lane; i < end; i += 64) {
      const int high = nf4_code(get<T>(p, i, end) * inverse);
      const int low = nf4_code(get<T>(p, i + 1, end) * inverse);
      p.codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(ScaleQuantize p, int64_t blocks) {
  __shared__ float code[256];
  code[threadIdx.x] = p.code[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t block = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; block < blocks;
       block += warps) {
    const int64_t from = block * p.block_size;
    const int64_t end = min(p.count, from + p.block_size);
    float absmax = 0;
    for (int64_t i = from + lane; i < end; i += 32) absmax = fmaxf(absmax, fabsf(p.values[i]));
    absmax = warp_max(absmax);
    if (lane == 0) p.absmax[block] = absmax;
    const float inverse = reciprocal(absmax);
    for (int64_t i = from + lane; i < end; i += 32) {
      p.codes[i] = static_cast<uint8_t>(nearest_code(code, p.values[i] * inverse));
    }
  }
}

int grid(int64_t wanted) { return static_cast<int>(std::min(wanted, kMaxBlocks)); }

template <class Run>
void of_type(FloatType type, Run run) {
  if (type == FloatType::kFloat32) return run(float{});
  if (type == FloatType::kBfloat16) return run(__nv_bfloat16{});
  run(__half{});
}

}  // namespace

void nf4_dequantize_cuda(const Nf4Dequantize& p, CUstream_st* stream) {
  if (p.count == 0) return;
  const bool aligned = reinterpret_cast<uintptr_t>(p.codes) % 4 == 0 && p.begin % 32 == 0 &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  const int64_t elements = aligned ? kThreads / 32 * kSpan : kThreads;
  const int blocks = static_cast<int>(std::min(ceil_div(p.count, elements), kMaxGrid));
  of_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    auto* const kernel = aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(p, p.fp4 ? kFp4 : kNf4);
  });
  check_launch("nf4_dequantize");
}

void nf4_quantize_cuda(const Nf4Quantize& p, CUstream_st* stream) {
  if (p.count == 0) return;
  const int64_t blocks = ceil_div(p.count, p.block_size);
  of_type(p.type, [&](auto zero) {
    quantize_kernel<decltype(zero)>
        <<<grid(ceil_div(blocks, kThreads / 32)), kThreads, 0, stream>>>(p, blocks);
  });
  check_launch("nf4_quantize");
}

void scale_quantize_cuda(const ScaleQuantize& p, CUstream_st* stream) {
  if (p.count == 0) return;
  const int64_t blocks = ceil_div(p.count, p.block_size);
  scale_kernel<<<grid(ceil_div(blocks, kThreads / 32)), kThreads, 0, stream>>>(p, blocks);
  check_launch("scale_quantize");
}

}  // namespace fastlora
