// SPDX-License-Identifier: Apache-2.0
#include "backward.cuh"

using namespace fused_attention::cuda;

// A block computes dkey and dvalue of BLOCK_N keys of one key head, and adds their part of dquery to float32 sums.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ OnePassArguments arguments) {
  sm80::Backward::run(arguments);
}
