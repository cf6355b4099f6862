// Device counters that are zero between launches.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

struct CUstream_st;

namespace fastlora {

// Implemented where CUDA is (lora/sm90.cu).
bool is_capturing(CUstream_st* stream);
void zero_async(void* data, int64_t bytes, CUstream_st* stream);

// `count` zeros that belong to the kernels of this stream, which leave them zero: one after another
// they share them. In a graph, which may later run beside anything, every launch has its own, and a
// memset before it.
inline torch::stable::Tensor zero_counters(int64_t count, torch::stable::Device device,
                                           CUstream_st* stream) {
  using torch::stable::Tensor;
  const auto fresh = [&](int64_t size) {
    const int64_t shape[] = {size};
    Tensor made =
        torch::stable::empty({shape, 1}, torch::headeronly::ScalarType::Int, std::nullopt, device);
    zero_async(made.mutable_data_ptr(), size * 4, stream);
    return made;
  };
  if (is_capturing(stream)) return fresh(count);
  static std::mutex mutex;
  // Never destroyed: at exit torch may be gone already.
  static auto& known = *new std::map<std::pair<int32_t, CUstream_st*>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(static_cast<int32_t>(device.index()), stream);
  const auto found = known.find(key);
  if (found != known.end() && found->second.numel() >= count) return found->second;
  const Tensor made = fresh(count < 8192 ? 8192 : 2 * count);
  known.insert_or_assign(key, made);
  return made;
}

}  // namespace fastlora
