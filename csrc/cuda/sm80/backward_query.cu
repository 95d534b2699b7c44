// SPDX-License-Identifier: Apache-2.0
#include "backward_query.cuh"

using namespace fused_attention::cuda;

// A block computes dquery of BLOCK_M rows of one head.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::BackwardQuery::run(arguments);
}
