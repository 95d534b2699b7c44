// SPDX-License-Identifier: Apache-2.0
#include "backward_key.cuh"

using namespace fused_attention::cuda;

// A block computes dvalue of BLOCK_N keys of one key head.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::BackwardKey<false, true>::run(arguments);
}
