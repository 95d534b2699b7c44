// SPDX-License-Identifier: Apache-2.0
// The dynamic shared memory of a block, as the struct that says where things are in it.
#pragma once
#include <cstddef>

#include "ptx.cuh"

namespace fused_attention::cuda {

// What a kernel takes and what its row of instances/manifest.py has; where they differ, the compiler's error names both.
template <int BYTES, int IN_MANIFEST>
struct SharedBytes {
  static_assert(BYTES == IN_MANIFEST, "manifest.py has another number of bytes of shared memory");
  static constexpr bool kAgree = true;
};

// Config: a Row (row.cuh) with a SharedMemory. NOTE: addresses for ptx:: are that of the whole plus an offset, because each address of a
// member of its own costs ptxas registers.
template <class Config>
FA_DEVICE typename Config::SharedMemory& shared_memory() {
  static_assert(SharedBytes<sizeof(typename Config::SharedMemory), Config::kSharedBytes>::kAgree);
  extern __shared__ __align__(128) unsigned char shared[];
  return *reinterpret_cast<typename Config::SharedMemory*>(shared);
}

}  // namespace fused_attention::cuda
