// SPDX-License-Identifier: Apache-2.0
// AVX512-BF16: bfloat16 as dot products of pairs, forward and backward.
#include <immintrin.h>

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

namespace fused_attention::cpu {

// This function must run on every machine, so it comes before the target pragma.
bool avx512_bf16_available() { return __builtin_cpu_supports("avx512bf16"); }

}  // namespace fused_attention::cpu

// GCC 12's own intrinsics headers trigger these warnings on _mm512_undefined_ps().
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#define FA_ISA avx512_bf16
#define FA_AVX512
#include "bf16_backward.h"
#include "bf16_forward.h"
#include "dot_product_tiles.h"

namespace fused_attention::cpu {

const Kernel kAvx512Bf16Forward = {avx512_bf16::Bf16Forward<avx512_bf16::DotProductTiles>::plan,
                                   avx512_bf16::Bf16Forward<avx512_bf16::DotProductTiles>::run};
const Kernel kAvx512Bf16Backward = {avx512_bf16::Bf16Backward<avx512_bf16::DotProductTiles>::plan,
                                    avx512_bf16::Bf16Backward<avx512_bf16::DotProductTiles>::run};

}  // namespace fused_attention::cpu
