// SPDX-License-Identifier: Apache-2.0
#include "decode.cuh"

using namespace fused_attention::cuda;

// A block computes out and lse of the rows, 16 at most, of the query heads that share a key head, or their part from a share of the keys.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ ForwardArguments arguments) {
  sm80::Decode::run(arguments);
}
