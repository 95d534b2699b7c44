// SPDX-License-Identifier: Apache-2.0
#include "single_tile_forward.cuh"

using namespace fused_attention::cuda;

// A block computes out and lse of several units, each by a group of warps: all keys, and 16 rows a warp, of heads that share the keys.
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm)
    ROW_NAME(const __grid_constant__ ForwardArguments arguments) {
  sm80::SingleTileForward::run(arguments);
}
