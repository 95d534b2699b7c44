// SPDX-License-Identifier: Apache-2.0
#include "mask_gradient.cuh"

using namespace fused_attention::cuda;

// A block computes the gradient of BLOCK_M x BLOCK_N elements of a float mask, summed over the heads and batch elements that share them.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::MaskGradient::run(arguments);
}
