// SPDX-License-Identifier: Apache-2.0
// Where things are in the shared memory of a group of warps of the single-tile kernels, in bytes: as the kernels find them, and as the host
// asks for what a call needs. `warps` is the size of the group.
#pragma once
#include "../../host_device.h"
#include "../forward_arguments.h"

namespace fused_attention::cuda::sm80 {

struct SingleTileForwardLayout {
  int q = 0;  // (16, Dqk) of each warp; then its rows of out
  int k, v;   // (keys, Dqk), (keys, Dv); keys: a multiple of 32
  int bytes;

  FA_HOST_DEVICE constexpr SingleTileForwardLayout(int head_dim_qk, int head_dim_v, int warps, int keys)
      : k(q + 2 * kRowsPerWarp * warps * head_dim_qk), v(k + 2 * keys * head_dim_qk), bytes(v + 2 * keys * head_dim_v) {}
};

struct SingleTileBackwardLayout {
  int keys = 0, values, scores;    // of each warp: (16, Dqk), (16, Dv), (16, block_m) of dS^T
  int rows;                        // `row_tiles` times the next one
  int row_tile;                    // of (block_m, Dqk), (block_m, Dv) and float32 (2, block_m): Q, dO, lse and delta
  int has_gradients, slope_parts;  // (warps,) numbers of 4 bytes
  int bytes;

  FA_HOST_DEVICE constexpr SingleTileBackwardLayout(int head_dim_qk, int head_dim_v, int block_m, int warps, int row_tiles)
      : values(keys + 2 * kRowsPerWarp * warps * head_dim_qk),
        scores(values + 2 * kRowsPerWarp * warps * head_dim_v),
        rows(scores + 2 * kRowsPerWarp * warps * block_m),
        row_tile(block_m * (2 * head_dim_qk + 2 * head_dim_v + 2 * 4)),
        has_gradients(rows + row_tiles * row_tile),
        slope_parts(has_gradients + 4 * warps),
        bytes(has_gradients + 128) {}  // of 16 warps at most; the next group's tiles are as aligned as these
};

}  // namespace fused_attention::cuda::sm80
