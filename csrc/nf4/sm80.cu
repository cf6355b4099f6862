// y = x W^T + bias + h B^T, h = s x A^T, of up to 64 rows: W [n, k] in 4 bits, read once, as it
// lies.
//
//   CTA      32 features (rows of W), up to 32 rows and all of K, of which every warp takes a
//   share; then the
//            warps' sums are added up in order, h first, which every CTA makes for itself
//   product  mma.sync m16n8k16: 16 features, or the ranks, by 8 rows of x. The tensor cores do not
//            mind the order of K: of the 64 elements of a block a lane takes 16 that are
//            neighbours, which are 8 bytes of codes and 32 of x
//   codes    a byte is two elements: a table of all 256 pairs, for every lane in a bank of its own
//            (32 KB of shared memory), turns it into a register of an operand
//   scales   multiply the sums of a block, in fp32: elements are code values, rounded to x's type
//
// Takes whole blocks of 64 elements or more in a row. No barrier in the main loop: warps hide each
// other's loads; the codes of 2 blocks are on the way while 2 are multiplied.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "host/dependent_launch.cuh"
#include "host/launch.cuh"
#include "nf4/code.cuh"
#include "nf4/few.h"

namespace fastlora {
namespace {

constexpr int kFeatures = 32;  // of a CTA
constexpr int kBlockK = 64;
constexpr int kAhead = 2;  // blocks whose codes are loaded together
constexpr int kSums = kFeatures + kMostFewRanks;
constexpr int kTableBytes = 256 * 32 * 4;

// Shared memory, in bytes: the table, and when all have done with it the warps' sums; then the
// codes of quantised scales, then h [ranks, rows].
template <int kWarps, int kRows>
struct Shared {
  static constexpr int kPitch = kRows + 1;  // odd: features differ in banks
  static constexpr int kSumBytes = kWarps * kSums * kPitch * 4;
  static constexpr int kNested = kSumBytes > kTableBytes ? kSumBytes : kTableBytes;
  static constexpr int kH = kNested + 256 * 4;
  static constexpr int kBytes = kH + kMostFewRanks * kRows * 4;
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

// Codes of some blocks, and for each feature of the lane the scale of one of them.
struct Codes {
  uint2 words[kAhead][4];
  float scales[4];
};

// What a warp reads of W: the lane's features are g, g + 8, g + 16 and g + 24 of the CTA's.
struct Weight {
  const Nf4Scales& scales;
  const float* nested_code;  // in shared memory
  float offset;
  const uint8_t* codes[4];  // from the lane's own bytes on
  int block[4];             // the row's first
  int shift;                // of blocks of 64 to the weight's
  int lane;

  __device__ __forceinline__ void load(Codes& loaded, int j, int end) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int b = 0; b < kAhead; ++b) {
        const int at = min(j + b, end - 1) * (kBlockK / 2);
        loaded.words[b][i] = __ldcs(reinterpret_cast<const uint2*>(codes[i] + at));
      }
      loaded.scales[i] = scale(block[i] + (min(j + lane % kAhead, end - 1) >> shift));
    }
  }
  __device__ __forceinline__ float scale(int at) const {
    if (scales.absmax != nullptr) return __ldg(scales.absmax + at);
    return __fadd_rn(__fmul_rn(nested_code[__ldg(scales.codes + at)],
                               __ldg(scales.nested_absmax + (at >> scales.nested_shift))),
                     offset);
  }
};

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

template <class T, class A, int kWarps, int kRows>
__global__ void __launch_bounds__(kWarps * 32, kRows <= 16 && kWarps == 8 ? 2 : 1)
    few_kernel(Nf4Few p, CodeBook book) {
  constexpr int kTiles = kRows / 8;
  extern __shared__ __align__(16) char shared[];
  auto* const sums = reinterpret_cast<float*>(shared);  // where the table was
  auto* const nested_code = reinterpret_cast<float*>(shared + Shared<kWarps, kRows>::kNested);
  auto* const h = reinterpret_cast<float*>(shared + Shared<kWarps, kRows>::kH);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t feature = int64_t{blockIdx.x} * kFeatures;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;

  fill_table<T>(shared, book, h);
  float offset = 0;
  if (p.scales.absmax == nullptr) {
    for (int i = threadIdx.x; i < 256; i += kWarps * 32) nested_code[i] = p.scales.nested_code[i];
    offset = *p.scales.offset;
  }
  __syncthreads();

  Weight weight{p.scales, nested_code, offset, {}, {}, p.block_shift - 6, lane};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = min(feature + i * 8 + g, p.n - 1);
    weight.codes[i] = p.codes + row * (p.k / 2) + q * 8;
    weight.block[i] = static_cast<int>(row * (p.k >> p.block_shift));
  }
  const T* x[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int64_t row = min(int64_t{first_row + t * 8 + g}, p.m - 1);
    x[t] = static_cast<const T*>(p.x) + row * p.x_pitch + q * 16;
  }
  const bool low_rank = p.rank > 0;
  const A* a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t rank = max(int64_t{0}, min(int64_t{i * 8 + g}, p.rank - 1));
    a[i] = static_cast<const A*>(p.a) + rank * p.k + q * 16;
  }

  float acc[2][kTiles][4] = {}, ranks[kTiles][4] = {};
  const auto block = [&](const Codes& codes, int b, int j) {
    uint32_t of_x[kTiles][8];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_pairs<T>(of_x[t], x[t] + j * kBlockK);
    if (low_rank) {
      uint32_t of_a[2][8];
      load_pairs<T>(of_a[0], a[0] + j * kBlockK);
      load_pairs<T>(of_a[1], a[1] + j * kBlockK);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t step[4] = {of_a[0][2 * s], of_a[1][2 * s], of_a[0][2 * s + 1],
                                  of_a[1][2 * s + 1]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply<T>(ranks[t], step, of_x[t][2 * s], of_x[t][2 * s + 1]);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {  // 16 features
      float sum[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < 4; ++s) {  // 16 elements
        uint32_t of_w[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 words = codes.words[b][f * 2 + i];
          const uint32_t word = s < 2 ? words.x : words.y;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            constexpr int kEntry = 7;  // log2 of an entry's bytes
            const int from = s % 2 * 16 + e * 8;
            const uint32_t at = from < kEntry ? word << (kEntry - from) : word >> (from - kEntry);
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
        const float scale = __shfl_sync(0xFFFFFFFF, codes.scales[f * 2 + i], (lane & ~3) + b);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          acc[f][t][2 * i] += scale * sum[t][2 * i];
          acc[f][t][2 * i + 1] += scale * sum[t][2 * i + 1];
        }
      }
    }
  };

  const int blocks = static_cast<int>(p.k / kBlockK);
  const int begin = static_cast<int>(int64_t{blocks} * warp / kWarps);
  const int end = static_cast<int>(int64_t{blocks} * (warp + 1) / kWarps);
  const auto step = [&](const Codes& now, Codes& next, int j) {
    if (j + kAhead < end) weight.load(next, j + kAhead, end);
#pragma unroll
    for (int b = 0; b < kAhead; ++b) {
      if (j + b < end) block(now, b, j + b);
    }
  };
  Codes even, odd;  // blocks kAhead at a time
  if (begin < end) weight.load(even, begin, end);
#pragma unroll 1
  for (int j = begin; j < end; j += 2 * kAhead) {
    step(even, odd, j);
    if (j + kAhead < end) step(odd, even, j + kAhead);
  }

  // Every warp's sums, features and then ranks, by rows of x.
  constexpr int kPitch = Shared<kWarps, kRows>::kPitch;
  __syncthreads();  // the table is not read any more
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = t * 8 + q * 2 + e % 2, down = g + e / 2 * 8;
      float* const to = sums + warp * kSums * kPitch + column;
      to[down * kPitch] = acc[0][t][e];
      to[(16 + down) * kPitch] = acc[1][t][e];
      to[(kFeatures + down) * kPitch] = ranks[t][e];
    }
  }
  __syncthreads();
  const auto total = [&](int sum, int row) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[(w * kSums + sum) * kPitch + row];
    return all;
  };
  const int rank = static_cast<int>(p.rank);
  const float scale = p.scaling == nullptr ? p.scale : p.scale * *p.scaling;
  for (int i = threadIdx.x; i < rank * kRows; i += kWarps * 32) {
    const int r = i % rank, row = i / rank;
    const T rounded = static_cast<T>(scale * total(kFeatures + r, row));
    h[r * kRows + row] = wide(rounded);
    if (blockIdx.x == 0 && first_row + row < p.m) {
      static_cast<T*>(p.h)[(first_row + row) * rank + r] = rounded;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kFeatures * kRows; i += kWarps * 32) {
    const int row = i / kFeatures;
    const int64_t column = feature + i % kFeatures;
    if (first_row + row >= p.m || column >= p.n) continue;
    float y = total(i % kFeatures, row);
    for (int r = 0; r < rank; ++r) {
      const int64_t at = column * rank + r;
      const float b = p.b_float ? wide(static_cast<T>(static_cast<const float*>(p.b)[at]))
                                : wide(static_cast<const T*>(p.b)[at]);
      y += h[r * kRows + row] * b;
    }
    if (p.bias != nullptr) y += wide(static_cast<const T*>(p.bias)[column]);
    static_cast<T*>(p.y)[(first_row + row) * p.n + column] = static_cast<T>(y);
  }
}

template <class T, class A, int kWarps, int kRows>
void launch(const Nf4Few& p, CUstream_st* stream) {
  auto* const kernel = few_kernel<T, A, kWarps, kRows>;
  constexpr int kBytes = Shared<kWarps, kRows>::kBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "cudaFuncSetAttribute");
  const dim3 ctas(static_cast<unsigned>(ceil_div(p.n, kFeatures)),
                  static_cast<unsigned>(ceil_div(p.m, kRows)));
  kernel<<<ctas, kWarps * 32, kBytes, stream>>>(p, p.fp4 ? kFp4 : kNf4);
  check_launch("nf4_few");
}

template <class T, class A>
void launch_for(const Nf4Few& p, CUstream_st* stream) {
  // Where a CTA has an SM to itself, more warps hide its loads.
  const bool alone = ceil_div(p.n, kFeatures) <= current_multiprocessors();
  if (p.m <= 8) return alone ? launch<T, A, 16, 8>(p, stream) : launch<T, A, 8, 8>(p, stream);
  if (p.m <= 16) return alone ? launch<T, A, 16, 16>(p, stream) : launch<T, A, 8, 16>(p, stream);
  launch<T, A, 8, 32>(p, stream);
}

}  // namespace

void nf4_few_cuda(const Nf4Few& p, CUstream_st* stream) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    p.a_float ? launch_for<T, float>(p, stream) : launch_for<T, T>(p, stream);
  };
  if (p.half) return of_type(__half{});
  of_type(__nv_bfloat16{});
}

}  // namespace fastlora
