// Programmatic dependent launch: a kernel may start while the one before it in the stream still
// runs. Both do nothing in a kernel that was launched without the attribute, and on its own.
#pragma once

namespace fastlora::sm90 {

// Waits until the kernels before this one are complete and their writes are visible to the thread.
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start when every CTA has said so or exited.
__device__ __forceinline__ void pdl_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace fastlora::sm90
