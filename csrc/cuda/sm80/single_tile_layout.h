// SPDX-License-Identifier: Apache-2.0
// Byte offsets in the shared memory of a group of warps of the single-tile kernels, for the kernels, and for the host, which asks how much
// a call needs. warps: in the group.
#pragma once
#include "../../host_device.h"
#include "../forward_arguments.h"

namespace fused_attention::cuda::sm80 {

struct SingleTileForwardLayout {
  int q = 0;  // (16, Dqk) per warp; at the end its rows of out
  int k, v;   // (keys, Dqk), (keys, Dv); keys: a multiple of 32
  int bytes;

  FA_HOST_DEVICE constexpr SingleTileForwardLayout(int head_dim_qk, int head_dim_v, int warps, int keys)
      : k(q + 2 * kRowsPerWarp * warps * head_dim_qk), v(k + 2 * keys * head_dim_qk), bytes(v + 2 * keys * head_dim_v) {}
};

struct SingleTileBackwardLayout {
  int keys = 0, values, scores;    // per warp: (16, Dqk), (16, Dv), (16, block_m) of dS^T
  int rows;                        // row_tiles times row_tile
  int row_tile;                    // Q (block_m, Dqk), dO (block_m, Dv), and float32 lse and delta (2, block_m)
  int has_gradients, slope_parts;  // (warps,) numbers of 4 bytes
  int bytes;

  FA_HOST_DEVICE constexpr SingleTileBackwardLayout(int head_dim_qk, int head_dim_v, int block_m, int warps, int row_tiles)
      : values(keys + 2 * kRowsPerWarp * warps * head_dim_qk),
        scores(values + 2 * kRowsPerWarp * warps * head_dim_v),
        rows(scores + 2 * kRowsPerWarp * warps * block_m),
        row_tile(block_m * (2 * head_dim_qk + 2 * head_dim_v + 2 * 4)),
        has_gradients(rows + row_tiles * row_tile),
        slope_parts(has_gradients + 4 * warps),
        bytes(has_gradients + 128) {}  // for up to 16 warps; keeps the next group's tiles aligned
};

}  // namespace fused_attention::cuda::sm80
