// SPDX-License-Identifier: Apache-2.0
#include "backward_query_pairs.cuh"

using namespace fused_attention::cuda;

// A block computes dquery of 64 rows of one head, two warps to 16 rows.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::BackwardQueryPairs::run(arguments);
}
