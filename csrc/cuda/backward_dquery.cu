// SPDX-License-Identifier: Apache-2.0
#include "backward_dquery.cuh"
#include "row.cuh"

using namespace fused_attention::cuda;

// A block turns the float32 sums of BLOCK_M rows of one head into dquery, eight lanes per row.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ OnePassArguments arguments) {
  backward_dquery<Row::kDtype, Row::kBlockM>(arguments);
}
