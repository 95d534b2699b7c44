// SPDX-License-Identifier: Apache-2.0
// The family of kernels on mma.sync, for compute capability 8.0 and newer.
#pragma once
#include "../family.h"

namespace fused_attention::cuda::sm80 {

extern const Family kFamily;

}  // namespace fused_attention::cuda::sm80
