// SPDX-License-Identifier: Apache-2.0
#include "forward.cuh"

using namespace fused_attention::cuda;

// A block computes out and lse of BLOCK_M rows of one head against all the keys that they see.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ ForwardArguments arguments) {
  sm80::Forward::run(arguments);
}
