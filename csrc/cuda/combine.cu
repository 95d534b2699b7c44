// SPDX-License-Identifier: Apache-2.0
#include "combine.cuh"
#include "row.cuh"

using namespace fused_attention::cuda;

// A block computes out and lse of BLOCK_M rows, one per warp, from the partial results of decoding blocks.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ ForwardArguments arguments) {
  combine<Row::kDtype, Row::kBlockM>(arguments);
}
