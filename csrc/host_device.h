// SPDX-License-Identifier: Apache-2.0
// For functions that run on the CPU and in kernels on a GPU.
#pragma once

#if defined(__CUDACC__)
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE inline __attribute__((always_inline))  // never a shared copy compiled for one instruction set
#endif
