// SPDX-License-Identifier: Apache-2.0
#include "backward_key_pairs.cuh"

using namespace fused_attention::cuda;

// A block computes dkey and dvalue of 64 keys of one key head, two warps to 16 keys.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::BackwardKeyPairs::run(arguments);
}
