// Device counters that a kernel finds zero. Implemented where CUDA is (lora/sm90.cu).
#pragma once

#include <cstdint>
#include <mutex>

struct CUstream_st;

namespace fastlora {

bool is_capturing(CUstream_st* stream);
void zero_async(void* data, int64_t bytes, CUstream_st* stream);

// The counters of a stream's next launch, to be made while this exists. Two sets take turns: a
// launch uses one and zeroes what the launch before used of the other, when that one is over.
// So nobody zeroes anything at the end of a kernel, where all would wait for it.
//
// Not of torch's allocator: torch.compile may be filling a pool of its own, and counts what is left
// in it. Not while the stream is captured: a graph may later run beside anything, so each of its
// launches brings its own.
// Where the launch is not known to have been made (something threw), both sets are made anew.
class StreamCounters {
 public:
  StreamCounters(int device, CUstream_st* stream, int64_t count);

  uint32_t* zeros() const;
  uint32_t* used() const;  // to be zeroed: used_count() of them
  int64_t used_count() const;
  void launched();  // the kernel that does so

 private:
  struct Sets;
  Sets& sets_;
  const int64_t count_;
  const std::unique_lock<std::mutex> lock_;  // one launch at a time

  static Sets& of(int device, CUstream_st* stream);
};

}  // namespace fastlora
