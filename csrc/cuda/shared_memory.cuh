// SPDX-License-Identifier: Apache-2.0
// The dynamic shared memory of a block.
#pragma once
#include "ptx.cuh"

namespace fused_attention::cuda {

// What a kernel needs and what its row of instances/manifest.py says; if they differ, the compiler's error names both.
template <int BYTES, int IN_MANIFEST>
struct SharedBytes {
  static_assert(BYTES == IN_MANIFEST, "manifest.py has another number of bytes of shared memory");
  static constexpr bool kAgree = true;
};

extern __shared__ __align__(128) unsigned char shared_bytes[];

// All of it, as the struct that describes its layout. Kernel: a Row (row.cuh) with a SharedMemory.
template <class Kernel>
FA_DEVICE typename Kernel::SharedMemory& shared_memory() {
  static_assert(SharedBytes<sizeof(typename Kernel::SharedMemory), Kernel::kSharedBytes>::kAgree);
  return *reinterpret_cast<typename Kernel::SharedMemory*>(shared_bytes);
}

}  // namespace fused_attention::cuda
