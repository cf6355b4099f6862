// y = x W^T + bias + h B^T, h = s x A^T, of few rows: W [n, k] in 4 bits, read as it lies.
//
//   h        by a kernel of its own in front, 8 to 32 rows of x to a CTA, or on Hopper to a cluster
//            that splits k; the other only waits for it when its sums are done
//   CTA      32 features (rows of W), up to 32 rows and all of K, of which every warp takes a part;
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
#include <algorithm>

#include "common/sm90/cluster.cuh"
#include "common/sm90/copy_async.cuh"
#include "common/sm90/pdl.cuh"
#include "host/dependent_launch.cuh"
#include "host/launch.cuh"
#include "nf4/decode.cuh"
#include "nf4/linear.h"

namespace fastlora {
namespace {

constexpr int kFeatures = 32;  // of a CTA
constexpr int kBlockK = kNf4BlockK;
constexpr int kShift = 7, kTableBytes = 256 << kShift;
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
  static_assert((kWarps * kFeatures * kPitch + kRows * kMostNf4Ranks) * 4 <= kNested);
};

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

// h = scale x A^T: of kTiles x 8 rows of x, all ranks. Parts of k meet in shared memory: warps, and
// where there are clusters the CTAs of one. Both are added in order.
constexpr int kRankWarps = 8;

template <class T, class A, int kTiles>
__global__ void __launch_bounds__(kRankWarps * 32) ranks_kernel(Nf4Linear p, int splits) {
#if __CUDA_ARCH__ >= 900
  sm90::pdl_launch_dependents();
#endif
  constexpr int kRows = kTiles * 8, kEach = kMostNf4Ranks * kRows;
  __shared__ float sums[kRankWarps][kMostNf4Ranks][kRows + 1];
  __shared__ float share[kEach];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int part = static_cast<int>(blockIdx.x) % splits;
  const int64_t first = int64_t{blockIdx.x / splits} * kRows;
  const T* x[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    x[t] = static_cast<const T*>(p.x) + min(first + t * 8 + g, p.m - 1) * p.x_pitch + q * 16;
  }
  const A* a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = static_cast<const A*>(p.a) + min(int64_t{i * 8 + g}, p.rank - 1) * p.k + q * 16;
  }
  float acc[kTiles][4] = {};
  const int64_t blocks = p.k / kBlockK;
#pragma unroll 2
  for (int64_t j = part * kRankWarps + warp; j < blocks; j += splits * kRankWarps) {
    uint32_t of_x[kTiles][8], of_a[2][8];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_pairs<T>(of_x[t], x[t] + j * kBlockK);
    load_pairs<T>(of_a[0], a[0] + j * kBlockK);
    load_pairs<T>(of_a[1], a[1] + j * kBlockK);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t step[4] = {of_a[0][2 * s], of_a[1][2 * s], of_a[0][2 * s + 1],
                                of_a[1][2 * s + 1]};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply<T>(acc[t], step, of_x[t][2 * s], of_x[t][2 * s + 1]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][g + e / 2 * 8][t * 8 + q * 2 + e % 2] = acc[t][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kEach; i += kRankWarps * 32) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kRankWarps; ++w) all += sums[w][i % kMostNf4Ranks][i / kMostNf4Ranks];
    share[i] = all;
  }
#if __CUDA_ARCH__ >= 900
  sm90::cluster_sync();
#else
  __syncthreads();
#endif
  const float scale = p.scaling == nullptr ? p.scale : p.scale * *p.scaling;
  for (int i = part * kRankWarps * 32 + static_cast<int>(threadIdx.x); i < kEach;
       i += splits * kRankWarps * 32) {
    float all = 0;
    for (int s = 0; s < splits; ++s) {
#if __CUDA_ARCH__ >= 900
      float one;
      asm volatile(
          "ld.shared::cluster.f32 %0, [%1];"
          : "=f"(one)
          : "r"(sm90::address_in(static_cast<uint32_t>(__cvta_generic_to_shared(share + i)), s))
          : "memory");
      all += one;
#else
      all += share[i];
#endif
    }
    const int64_t row = first + i / kMostNf4Ranks;
    const int r = i % kMostNf4Ranks;
    if (row < p.m && r < p.rank) {
      static_cast<T*>(p.h)[row * p.rank + r] = static_cast<T>(scale * all);
    }
  }
#if __CUDA_ARCH__ >= 900
  sm90::cluster_sync();  // the others may still read
#endif
}

template <class T, int kWarps, int kRows>
__global__ void __launch_bounds__(kWarps * 32, kRows <= 16 && kWarps == 8 ? 2 : 1)
    few_kernel(Nf4Linear p, CodeBook book) {
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
  if (threadIdx.x < 16) nested_code[threadIdx.x] = book.value[threadIdx.x];
  __syncthreads();
  fill_table<T, kShift>(shared, nested_code, threadIdx.x, kWarps * 32);
  __syncthreads();
  if (nested) {
    for (int i = threadIdx.x; i < 256; i += kWarps * 32) nested_code[i] = p.scales.nested_code[i];
  }
  __syncthreads();

  float acc[2][kTiles][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int j = begin; j < end; ++j) {
    const float scale = make_scale(ahead, nested, nested_code, offset);
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
            of_w[e * 2 + i] = table_entry<kShift>(shared, word, s % 2 * 2 + e, lane * 4);
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
  float b[kMostNf4Ranks] = {};
  auto* const h = sums + kWarps * kFeatures * kPitch;  // [rows, 16]
  if (rank > 0) {
#pragma unroll
    for (int r = 0; r < kMostNf4Ranks; ++r) {
      if (r >= rank || column >= p.n) break;
      b[r] = p.b_float ? wide(static_cast<T>(static_cast<const float*>(p.b)[column * rank + r]))
                       : wide(static_cast<const T*>(p.b)[column * rank + r]);
    }
#if __CUDA_ARCH__ >= 900
    sm90::pdl_wait();
#endif
    for (int i = threadIdx.x; i < kRows * kMostNf4Ranks; i += kWarps * 32) {
      const int row = first_row + i / kMostNf4Ranks, r = i % kMostNf4Ranks;
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
      for (int r = 0; r < kMostNf4Ranks; ++r) y += h[row * kMostNf4Ranks + r] * b[r];
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

// Whether the code that runs was compiled for 9.0 or later: PTX of 8.0 may run there as well.
template <class Kernel>
bool is_for_hopper(Kernel* kernel) {
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  return code.ptxVersion >= 90;
}

template <class T, int kWarps, int kRows>
void launch(const Nf4Linear& p, CUstream_st* stream) {
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
  config.numAttrs = p.rank > 0 && is_for_hopper(kernel) ? 1 : 0;  // it waits there
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, code_book<T>(p.fp4)), "nf4_sm80");
}

}  // namespace

void nf4_ranks_sm80(const Nf4Linear& p, CUstream_st* stream) {
  const auto launch = [&](auto* kernel, int rows) {
    // A block or two of 64 k to a warp. Up to 256 rows by few CTAs, for the kernel behind takes all
    // the SMs that it finds, and needs h late; more rows would keep few CTAs too long.
    const int ctas = p.m <= 256 ? 16 : 128;
    const auto most = static_cast<int>(ceil_div(p.k / kBlockK, kRankWarps));
    const auto tiles = static_cast<int>(ceil_div(p.m, rows));
    const int splits = is_for_hopper(kernel) ? std::max(1, std::min({8, most, ctas / tiles})) : 1;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = splits;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(tiles * splits);
    config.blockDim = dim3(kRankWarps * 32);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = splits > 1 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, p, splits), "nf4: h");
  };
  const auto of_types = [&](auto zero, auto factor) {
    using T = decltype(zero);
    using A = decltype(factor);
    if (p.m <= 8) return launch(ranks_kernel<T, A, 1>, 8);
    if (p.m <= 64) return launch(ranks_kernel<T, A, 2>, 16);
    launch(ranks_kernel<T, A, 4>, 32);
  };
  const auto of_type = [&](auto zero) { p.a_float ? of_types(zero, 0.0f) : of_types(zero, zero); };
  p.half ? of_type(__half{}) : of_type(__nv_bfloat16{});
}

void nf4_linear_sm80(const Nf4Linear& p, CUstream_st* stream) {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Where a CTA has an SM to itself, more warps hide its loads.
  const bool alone = ceil_div(p.n, kFeatures) <= current_multiprocessors();
  if (p.rank > 0) nf4_ranks_sm80(p, stream);
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
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
