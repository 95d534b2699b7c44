// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX2, FMA and F16C. Headers that are not ours must come before the target pragma.
#include <immintrin.h>

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

#pragma GCC target("avx2,fma,f16c")
#define FA_ISA avx2
#define FA_LANES 8
#include "fp32_compute_table.h"

namespace fused_attention::cpu {
const KernelTable kAvx2Kernels = avx2::fp32_compute_table("avx2");
}
