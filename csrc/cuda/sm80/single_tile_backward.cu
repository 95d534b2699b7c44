// SPDX-License-Identifier: Apache-2.0
#include "single_tile_backward.cuh"

using namespace fused_attention::cuda;

// A block computes every gradient of several key heads, each by a group of its warps: all rows, and all keys, 16 to a warp.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ BackwardArguments arguments) {
  sm80::SingleTileBackward::run(arguments);
}
