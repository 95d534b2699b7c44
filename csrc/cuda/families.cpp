// SPDX-License-Identifier: Apache-2.0
#include "family.h"
#include "sm80/plan.h"

namespace fused_attention::cuda {

const Family* const kFamilies[] = {&sm80::kFamily};
const int kNumFamilies = sizeof(kFamilies) / sizeof(kFamilies[0]);

}  // namespace fused_attention::cuda
