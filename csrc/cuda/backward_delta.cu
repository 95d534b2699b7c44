// SPDX-License-Identifier: Apache-2.0
#include "backward_delta.cuh"
#include "row.cuh"

using namespace fused_attention::cuda;

// A block computes row_lse and row_delta of BLOCK_M rows of one head, eight lanes per row, and clears their part of the sums of dquery.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ OnePassArguments arguments) {
  backward_delta<Row::kDtype, Row::kBlockM>(arguments);
}
