// SPDX-License-Identifier: Apache-2.0
// The portable kernels: 4-lane vectors, SSE2 on x86-64 and NEON on aarch64.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>

#include "../philox.h"
#include "kernel_table.h"

#if defined(__aarch64__)
// Scheduled before registers are allocated, a register tile loads all six elements of a at once, and two sums spill in every step.
#pragma GCC optimize("no-schedule-insns")
#endif
#define FA_ISA base
#define FA_LANES 4
#include "fp32_compute_table.h"

namespace fused_attention::cpu {
const KernelTable kBaseKernels = base::fp32_compute_table("base");
}
