// SPDX-License-Identifier: Apache-2.0
// AMX: float32 in two parts of bfloat16, forward and backward, in a file of its own so that it compiles next to isa_amx.cpp.
#include <immintrin.h>

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

// GCC 12's own intrinsics headers trigger these warnings on _mm512_undefined_ps().
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi2,amx-tile,amx-bf16")
#define FA_ISA amx_bf16x3
#define FA_AVX512
#include "amx_tiles.h"
#include "bf16_backward.h"
#include "bf16_forward.h"

namespace fused_attention::cpu {

using Forward = amx_bf16x3::Bf16Forward<amx_bf16x3::AmxTiles, amx_bf16x3::SplitStorage>;
using Backward = amx_bf16x3::Bf16Backward<amx_bf16x3::AmxTiles, amx_bf16x3::SplitStorage>;

const Kernel kAmxForwardBf16x3 = {Forward::plan, Forward::run};
const Kernel kAmxBackwardBf16x3 = {Backward::plan, Backward::run};

}  // namespace fused_attention::cpu
