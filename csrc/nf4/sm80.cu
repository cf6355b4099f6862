// y = x W^T + bias + h B^T, h = s x A^T, of few rows: W [n, k] in 4 bits, read as it lies.
//
//   h        by a kernel of its own in front, a CTA for 8 rows of x, which the other only waits for
//            when its sums are done
//   CTA      32 features (rows of W), up to 32 rows and all of K, of which every warp takes a
//   share;
//            then the warps' sums are added up in order
//   product  mma.sync m16n8k16: 16 features, or the ranks, by 8 rows of x. The tensor cores do not
//            mind the order of K: of the 64 elements of a block a lane takes 16 that are
//            neighbours, which are 8 bytes of codes and 32 of x
//   codes    a byte is two elements: a table of all 256 pairs, for every lane in a bank of its own
//            (32 KB of shared memory), turns it into a register of an operand
//   scales   multiply the sums of a block, in fp32: elements are code values, rounded to x's type
//
// Takes whole blocks of 64 elements or more in a row. A warp has a ring of blocks of codes and x in
// shared memory, filled by cp.async: no barrier in the main loop.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "common/sm90/copy_async.cuh"
#include "host/dependent_launch.cuh"
#include "host/launch.cuh"
#include "nf4/code.cuh"
#include "nf4/few.h"

namespace fastlora {
namespace {

constexpr int kFeatures = 32;  // of a CTA
constexpr int kBlockK = 64;
constexpr int kTableBytes = 256 * 32 * 4;
constexpr int kCodeBytes = kFeatures * kBlockK / 2;  // of a block
constexpr int kRowBytes = kBlockK * 2;

// Shared memory, in bytes: the table, then every warp's ring; the warps' sums, when all have done
// with both; and the codes of quantised scales.
template <int kWarps, int kRows>
struct Shared {
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = kCodeBytes + kRows * kRowBytes;
  static constexpr int kNested = kTableBytes + kWarps * kStages * kStageBytes;
  static constexpr int kBytes = kNested + 256 * 4;
  static constexpr int kPitch = kRows + 1;  // of sums: odd, so that features differ in banks
  static_assert((kWarps * kFeatures * kPitch + kRows * kMostFewRanks) * 4 <= kNested);
};

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <class T>
__device__ __forceinline__ float wide(T value) {
  return static_cast<float>(value);
}

// d += a b: 16 rows of a by 8 columns of b, 16 deep.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// 16 neighbours of a row, as 8 pairs.
template <class T, class From>
__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[8], const From* from) {
  if constexpr (std::is_same_v<From, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from) + i);
      pairs[2 * i] = pack2<T>(four.x, four.y);
      pairs[2 * i + 1] = pack2<T>(four.z, four.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from) + i);
      pairs[4 * i] = eight.x, pairs[4 * i + 1] = eight.y;
      pairs[4 * i + 2] = eight.z, pairs[4 * i + 3] = eight.w;
    }
  }
}

// A block's scale as it is loaded, a block ahead; it is made where it is used, in two roundings as
// in bitsandbytes.
struct Scale {
  float absmax;  // or nested_absmax, of
  uint32_t code;
};
__device__ __forceinline__ Scale load_scale(const Nf4Scales& scales, int block) {
  if (scales.absmax != nullptr) return {__ldg(scales.absmax + block), 0};
  return {__ldg(scales.nested_absmax + (block >> scales.nested_shift)),
          __ldg(scales.codes + block)};
}

// The table: entry `byte`, 32 times. Lanes begin at different banks.
template <class T>
__device__ __forceinline__ void fill_table(char* table, const CodeBook& book, float* scratch) {
  if (threadIdx.x < 16) scratch[threadIdx.x] = book.value[threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.x; i < 256 * 8; i += static_cast<int>(blockDim.x)) {
    const int byte = i % 256, chunk = (i / 256 + i) % 8;
    const uint32_t pair = pack2<T>(scratch[byte / 16], scratch[byte % 16]);
    *reinterpret_cast<uint4*>(table + byte * 128 + chunk * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// h = scale x A^T: of 8 rows of x, all ranks.
constexpr int kRankWarps = 16;

template <class T, class A>
__global__ void __launch_bounds__(kRankWarps * 32) ranks_kernel(Nf4Few p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  __shared__ float sums[kRankWarps][kMostFewRanks][9];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * 8;
  const T* const x = static_cast<const T*>(p.x) + min(first + g, p.m - 1) * p.x_pitch + q * 16;
  const A* a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = static_cast<const A*>(p.a) + min(int64_t{i * 8 + g}, p.rank - 1) * p.k + q * 16;
  }
  float acc[4] = {};
  const int64_t blocks = p.k / kBlockK;
#pragma unroll 2
  for (int64_t j = warp; j < blocks; j += kRankWarps) {
    uint32_t of_x[8], of_a[2][8];
    load_pairs<T>(of_x, x + j * kBlockK);
    load_pairs<T>(of_a[0], a[0] + j * kBlockK);
    load_pairs<T>(of_a[1], a[1] + j * kBlockK);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t step[4] = {of_a[0][2 * s], of_a[1][2 * s], of_a[0][2 * s + 1],
                                of_a[1][2 * s + 1]};
      multiply<T>(acc, step, of_x[2 * s], of_x[2 * s + 1]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sums[warp][g + e / 2 * 8][q * 2 + e % 2] = acc[e];
  __syncthreads();
  const int rank = static_cast<int>(p.rank);
  const int r = threadIdx.x % rank, row = static_cast<int>(threadIdx.x) / rank;
  if (row >= 8 || first + row >= p.m) return;
  float all = 0;
#pragma unroll
  for (int w = 0; w < kRankWarps; ++w) all += sums[w][r][row];
  const float scale = p.scaling == nullptr ? p.scale : p.scale * *p.scaling;
  static_cast<T*>(p.h)[(first + row) * rank + r] = static_cast<T>(scale * all);
}

template <class T, int kWarps, int kRows>
__global__ void __launch_bounds__(kWarps * 32, kRows <= 16 && kWarps == 8 ? 2 : 1)
    few_kernel(Nf4Few p, CodeBook book) {
  using Memory = Shared<kWarps, kRows>;
  constexpr int kTiles = kRows / 8, kStages = Memory::kStages;
  extern __shared__ __align__(128) char shared[];
  auto* const nested_code = reinterpret_cast<float*>(shared + Memory::kNested);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t feature = int64_t{blockIdx.x} * kFeatures;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;

  const int blocks = static_cast<int>(p.k / kBlockK);
  const int begin = static_cast<int>(int64_t{blocks} * warp / kWarps);
  const int end = static_cast<int>(int64_t{blocks} * (warp + 1) / kWarps);
  // What the lane copies next: 16 bytes of two features, and of every fourth row of x.
  char* const ring = shared + kTableBytes + warp * kStages * Memory::kStageBytes;
  const auto ring_address = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
  const uint8_t* codes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(feature + lane / 2 + i * 16, p.n - 1);
    codes[i] = p.codes + row * (p.k / 2) + begin * (kBlockK / 2) + lane % 2 * 16;
  }
  const T* x[kRows / 4];
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const int64_t row = min(int64_t{first_row + i * 4 + lane / 8}, p.m - 1);
    x[i] = static_cast<const T*>(p.x) + row * p.x_pitch + begin * kBlockK + lane % 8 * 8;
  }
  const auto copy = [&](int j, int stage) {
    if (j < end) {
      const uint32_t to = ring_address + stage * Memory::kStageBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sm90::copy_async_16(to + (i * 32 + lane) * 16, codes[i], 16);
        codes[i] += kBlockK / 2;
      }
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        const int row = i * 4 + lane / 8, chunk = lane % 8 ^ (row & 1);
        sm90::copy_async_16(to + kCodeBytes + row * kRowBytes + chunk * 16, x[i], 16);
        x[i] += kBlockK;
      }
    }
    sm90::copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i, i);

  // The scale of the lane's own feature, which it hands to those that multiply it.
  const int own = static_cast<int>(min(feature + lane, p.n - 1) * (p.k >> p.block_shift));
  const int shift = p.block_shift - 6;
  Scale ahead = load_scale(p.scales, own + (min(begin, blocks - 1) >> shift));
  const bool nested = p.scales.absmax == nullptr;
  const float offset = nested ? *p.scales.offset : 0.0f;
  fill_table<T>(shared, book, nested_code);
  __syncthreads();
  if (nested) {
    for (int i = threadIdx.x; i < 256; i += kWarps * 32) nested_code[i] = p.scales.nested_code[i];
  }
  __syncthreads();

  float acc[2][kTiles][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    const float scale =
        nested ? __fadd_rn(__fmul_rn(nested_code[ahead.code], ahead.absmax), offset) : ahead.absmax;
    sm90::copy_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies of this block are there, and all have read the last one
    copy(j + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    ahead = load_scale(p.scales, own + (min(j + 1, blocks - 1) >> shift));
    const char* const from = ring + stage * Memory::kStageBytes;
    uint32_t of_x[kTiles][8];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const char* const row = from + kCodeBytes + (t * 8 + g) * kRowBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 eight = *reinterpret_cast<const uint4*>(row + ((2 * q + i) ^ (g & 1)) * 16);
        of_x[t][4 * i] = eight.x, of_x[t][4 * i + 1] = eight.y;
        of_x[t][4 * i + 2] = eight.z, of_x[t][4 * i + 3] = eight.w;
      }
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {  // 16 features
      uint2 words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i] = *reinterpret_cast<const uint2*>(from + (f * 16 + i * 8 + g) * 32 + q * 8);
      }
      float sum[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {  // 16 elements
        uint32_t of_w[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t word = s < 2 ? words[i].x : words[i].y;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            constexpr int kEntry = 7;  // log2 of an entry's bytes
            const int bit = s % 2 * 16 + e * 8;
            const uint32_t at = bit < kEntry ? word << (kEntry - bit) : word >> (bit - kEntry);
            of_w[e * 2 + i] =
                *reinterpret_cast<const uint32_t*>(shared + ((at & 0x7F80) | lane * 4));
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply<T>(sum[t], of_w, of_x[t][2 * s], of_x[t][2 * s + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float by = __shfl_sync(0xFFFFFFFF, scale, f * 16 + i * 8 + g);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          acc[f][t][2 * i] += by * sum[t][2 * i];
          acc[f][t][2 * i + 1] += by * sum[t][2 * i + 1];
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  constexpr int kPitch = Memory::kPitch;
  auto* const sums = reinterpret_cast<float*>(shared);
  sm90::copy_async_wait<0>();
  __syncthreads();  // table and rings are not read any more
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = t * 8 + q * 2 + e % 2, down = g + e / 2 * 8;
      float* const to = sums + warp * kFeatures * kPitch + column;
      to[down * kPitch] = acc[0][t][e];
      to[(16 + down) * kPitch] = acc[1][t][e];
    }
  }
  __syncthreads();
  // A thread has one feature: its row of B stays in registers.
  const int rank = static_cast<int>(p.rank), own_feature = threadIdx.x % kFeatures;
  const int64_t column = feature + own_feature;
  float b[kMostFewRanks] = {};
  auto* const h = sums + kWarps * kFeatures * kPitch;  // [rows, 16]
  if (rank > 0) {
#pragma unroll
    for (int r = 0; r < kMostFewRanks; ++r) {
      if (r >= rank || column >= p.n) break;
      b[r] = p.b_float ? wide(static_cast<T>(static_cast<const float*>(p.b)[column * rank + r]))
                       : wide(static_cast<const T*>(p.b)[column * rank + r]);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    for (int i = threadIdx.x; i < kRows * kMostFewRanks; i += kWarps * 32) {
      const int row = first_row + i / kMostFewRanks, r = i % kMostFewRanks;
      const bool there = row < p.m && r < rank;
      h[i] = there ? wide(static_cast<const T*>(p.h)[row * rank + r]) : 0.0f;
    }
    __syncthreads();
  }
  if (column >= p.n) return;
  const float bias = p.bias == nullptr ? 0.0f : wide(static_cast<const T*>(p.bias)[column]);
  for (int row = threadIdx.x / kFeatures; row < kRows; row += kWarps) {
    if (first_row + row >= p.m) return;
    float y = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) y += sums[(w * kFeatures + own_feature) * kPitch + row];
    if (rank > 0) {
#pragma unroll
      for (int r = 0; r < kMostFewRanks; ++r) y += h[row * kMostFewRanks + r] * b[r];
    }
    static_cast<T*>(p.y)[(first_row + row) * p.n + column] = static_cast<T>(y + bias);
  }
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

template <class T, int kWarps, int kRows>
void launch(const Nf4Few& p, CUstream_st* stream) {
  auto* const kernel = few_kernel<T, kWarps, kRows>;
  constexpr int kBytes = Shared<kWarps, kRows>::kBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute early{};  // while h is being made
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(p.n, kFeatures)),
                        static_cast<unsigned>(ceil_div(p.m, kRows)));
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &early;
  // Only code that was compiled for 9.0 or later waits: PTX of 8.0 may run there as well.
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  config.numAttrs = p.rank > 0 && code.ptxVersion >= 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, p.fp4 ? kFp4 : kNf4), "nf4_few");
}

template <class T>
void launch_ranks(const Nf4Few& p, CUstream_st* stream) {
  const auto ctas = static_cast<unsigned>(ceil_div(p.m, 8));
  auto* const kernel = p.a_float ? ranks_kernel<T, float> : ranks_kernel<T, T>;
  kernel<<<ctas, kRankWarps * 32, 0, stream>>>(p);
  check_launch("nf4_few: h");
}

}  // namespace

void nf4_few_cuda(const Nf4Few& p, CUstream_st* stream) {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Where a CTA has an SM to itself, more warps hide its loads.
  const bool alone = ceil_div(p.n, kFeatures) <= current_multiprocessors();
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    if (p.rank > 0) launch_ranks<T>(p, stream);
    if (p.m > 16 && most >= Shared<8, 32>::kBytes) return launch<T, 8, 32>(p, stream);
    if (p.m > 8 && alone && most >= Shared<16, 16>::kBytes) return launch<T, 16, 16>(p, stream);
    if (p.m > 8 && most >= Shared<8, 16>::kBytes) return launch<T, 8, 16>(p, stream);
    if (alone && most >= Shared<16, 8>::kBytes) return launch<T, 16, 8>(p, stream);
    launch<T, 8, 8>(p, stream);
  };
  if (p.half) return of_type(__half{});
  of_type(__nv_bfloat16{});
}

}  // namespace fastlora
