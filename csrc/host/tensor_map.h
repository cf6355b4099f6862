// Tensor maps: how TMA cuts a matrix of global memory into boxes. Encoded on the host and passed to
// a kernel by value, as a __grid_constant__ parameter. Encoding takes about a microsecond, so
// maps are kept.
//
// The encoder is a function of the driver; it is looked up through the CUDA runtime, so that
// nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastlora {

enum class ElementType { kBfloat16, kFloat16, kFloat32, kByte };
enum class Swizzle { k32, k64, k128 };  // bytes of a box's row

namespace internal {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(
        std::string("fastlora: this CUDA driver has no cuTensorMapEncodeTiled (needs CUDA 12): ") +
        cudaGetErrorString(error));
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// Dimensions innermost first; pitches (elements) of dimensions 1 and up.
inline CUtensorMap encode(const void* data, ElementType type, int rank, const int64_t* sizes,
                          const int64_t* pitches, const int* box, Swizzle swizzle) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  const int bytes = type == ElementType::kFloat32 ? 4 : type == ElementType::kByte ? 1 : 2;
  const CUtensorMapDataType types[] = {
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_UINT8};
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                         CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t dims[3], strides[2];
  cuuint32_t boxes[3], steps[3];
  for (int i = 0; i < rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(pitches[i - 1]) * bytes;
  }
  CUtensorMap map;
  const CUresult result = encode_tiled(
      &map, types[static_cast<int>(type)], rank, const_cast<void*>(data), dims, strides, boxes,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "fastlora: cuTensorMapEncodeTiled failed with code " << result << " for address "
            << data << " (a multiple of 16 is needed), sizes";
    for (int i = 0; i < rank; ++i) message << ' ' << sizes[i];
    message << ", pitches (of a multiple of 16 bytes)";
    for (int i = 0; i + 1 < rank; ++i) message << ' ' << pitches[i];
    message << ", box";
    for (int i = 0; i < rank; ++i) message << ' ' << box[i];
    throw std::runtime_error(message.str());
  }
  return map;
}

}  // namespace internal

// A matrix [rows, cols] with contiguous rows `pitch` elements apart, in boxes of
// [box_rows, box_cols]: at most 256 each, and box_cols at most as many bytes as the swizzle's name.
// The address must be a multiple of 16, the pitch of 16 bytes. Loads fill what lies outside with 0.
inline CUtensorMap tensor_map_2d(const void* data, ElementType type, int64_t rows, int64_t cols,
                                 int64_t pitch, int box_rows, int box_cols,
                                 Swizzle swizzle = Swizzle::k128) {
  // A model asks for the same maps step after step: weights stay, and torch's allocator gives
  // activations the same places. A map is only numbers, so it never goes stale.
  struct Entry {
    std::array<int64_t, 8> key{};  // of nothing: no data is at 0
    CUtensorMap map;
  };
  constexpr size_t kEntries = 512;
  static thread_local const std::unique_ptr<Entry[]> known(new Entry[kEntries]);
  const std::array<int64_t, 8> key = {reinterpret_cast<intptr_t>(data),
                                      rows,
                                      cols,
                                      pitch,
                                      box_rows,
                                      box_cols,
                                      static_cast<int64_t>(type),
                                      static_cast<int64_t>(swizzle)};
  uint64_t hash = 0;
  for (const int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 0x9E3779B97F4A7C15;
  Entry& entry = known[hash >> 55];
  if (entry.key != key) {
    const int64_t sizes[] = {cols, rows};
    const int box[] = {box_cols, box_rows};
    entry.key = {};  // should encoding throw
    entry.map = internal::encode(data, type, 2, sizes, &pitch, box, swizzle);
    entry.key = key;
  }
  return entry.map;
}

}  // namespace fastlora
