// SPDX-License-Identifier: Apache-2.0
// One function for each PTX instruction that CUDA C++ has no name for: the only inline assembly of the kernels. PTX ISA 8.x, sm_80.
#pragma once
#include <cstdint>

#include "../problem.h"

#define FA_DEVICE __device__ __forceinline__

namespace fused_attention::cuda::ptx {

FA_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// x, opaque to the compiler, so that it recomputes what depends on x instead of keeping it in registers.
FA_DEVICE uint32_t again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, with 2^-inf = 0; about 2 ulp.
FA_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); 2^-22 absolute or relative, whichever is larger.
FA_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; 1 ulp.
FA_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to DTYPE, low in the lower half.
template <Dtype DTYPE>
FA_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (DTYPE == Dtype::bfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

FA_DEVICE float from_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Four 8 x 8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8 and receives elements 2 (i % 4) and the next of row i / 4.
FA_DEVICE void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same, of the transposed matrices.
FA_DEVICE void ldmatrix_x4_trans(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8) = a (16 x 16) b (16 x 8) + c, float32 sums. With g = lane / 4 and k = 2 (lane % 4) a lane holds of c and d rows {g, g + 8} x
// columns {k, k + 1}; of a (g, k), (g + 8, k), (g, k + 8), (g + 8, k + 8) and the column after each; of b rows {k, k + 1}, {k + 8, k + 9}
// of column g.
#define FA_MMA(TYPES)                                                                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
template <Dtype DTYPE>
FA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (DTYPE == Dtype::bfloat16) {
    FA_MMA("f32.bf16.bf16.f32");
  } else {
    FA_MMA("f32.f16.f16.f32");
  }
}
#undef FA_MMA

// 16 bytes from global to shared memory, past L1; zeros, and nothing is read, where not `exists`.
FA_DEVICE void cp_async_16(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(exists ? 16 : 0) : "memory");
}

// 4 bytes, through L1.
FA_DEVICE void cp_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

FA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest N groups of this thread have landed.
template <int N>
FA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Named barriers, 16 in a block, for `threads` threads, whole warps: each waits until so many have come, or comes and goes on. Before and
// after are ordered.
FA_DEVICE void barrier_sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
FA_DEVICE void barrier_arrive(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// Additions that other blocks see, in whatever order.
FA_DEVICE void red_add(float* sum, float x) { asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory"); }

FA_DEVICE uint32_t atomic_add(uint32_t* sum, uint32_t x) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(sum), "r"(x) : "memory");
  return before;
}

// One more, for whoever then loads it with acquire: everything that the block did before its last barrier.
FA_DEVICE void red_increment_release(uint32_t* sum) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(sum) : "memory"); }

FA_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace fused_attention::cuda::ptx
