// Device counters that are zero between launches. Implemented where CUDA is (lora/sm90.cu).
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastlora {

bool is_capturing(CUstream_st* stream);
void zero_async(void* data, int64_t bytes, CUstream_st* stream);

// `count` zeros that belong to the kernels of this stream, which leave them zero: one after another
// they share them. Not of torch's allocator: torch.compile may be filling a pool of its own, and
// counts what is left in it. Not while the stream is captured: a graph may later run beside
// anything, so each of its launches brings its own.
uint32_t* zeros_of_stream(int device, CUstream_st* stream, int64_t count);

}  // namespace fastlora
