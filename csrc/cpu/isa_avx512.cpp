// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512 F, DQ, BW and VL. Headers that are not ours must come before the target pragma.
#include <immintrin.h>

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

// GCC 12's own intrinsics headers trigger these warnings on _mm512_undefined_ps().
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi2")
#define FA_ISA avx512
#define FA_AVX512
#include "fp32_compute_table.h"

namespace fused_attention::cpu {
const KernelTable kAvx512Kernels = avx512::fp32_compute_table("avx512");
}
