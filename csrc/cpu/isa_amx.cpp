// SPDX-License-Identifier: Apache-2.0
// AMX: bfloat16 on tiles, forward and backward. x86-64 Linux only.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

namespace fused_attention::cpu {

// Linux grants the 8 KiB of tile state per process, on request only. This function must run on every machine, so it comes before the
// target pragma.
bool amx_available() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool available = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                                __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return available;
}

}  // namespace fused_attention::cpu

// GCC 12's own intrinsics headers trigger these warnings on _mm512_undefined_ps().
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,bmi2,amx-tile,amx-bf16")
#define FA_ISA amx
#define FA_AVX512
#include "amx_tiles.h"
#include "bf16_backward.h"
#include "bf16_forward.h"

namespace fused_attention::cpu {

const Kernel kAmxForward = {amx::Bf16Forward<amx::AmxTiles>::plan, amx::Bf16Forward<amx::AmxTiles>::run};
const Kernel kAmxBackward = {amx::Bf16Backward<amx::AmxTiles>::plan, amx::Bf16Backward<amx::AmxTiles>::run};

}  // namespace fused_attention::cpu
