// SPDX-License-Identifier: Apache-2.0
// What the backward kernels keep in shared memory: tiles of operands, and two numbers per row.
#pragma once
#include "../row.cuh"
#include "../row_block.cuh"

namespace fused_attention::cuda::sm80 {

struct BackwardTiles : Row {
  using QueryTile = SharedTile<kBlockM, kHeadDimQk>;
  using GradientTile = SharedTile<kBlockM, kHeadDimV>;  // of dout
  using KeyTile = SharedTile<kBlockN, kHeadDimQk>;
  using ValueTile = SharedTile<kBlockN, kHeadDimV>;
};

template <int ROWS>
struct RowStatistics {
  float lse[ROWS], delta[ROWS];
};

// Copies those of a tile of rows, asynchronously, one number per thread of the first 2 * ROWS. Absent rows get weights of 0.
//   row_lse, row_delta: from the tile's first row on
template <int ROWS>
FA_DEVICE void copy_statistics_async(RowStatistics<ROWS>& target, const float* row_lse, const float* row_delta, int rows_left,
                                     uint32_t thread) {
  const int row = static_cast<int>(thread) % ROWS, which = static_cast<int>(thread) / ROWS;
  if (which >= 2) return;
  float* const place = target.lse + which * ROWS + row;
  if (row < rows_left) {
    ptx::cp_async_4(ptx::shared_address(place), (which == 0 ? row_lse : row_delta) + row);
  } else {
    *place = which == 0 ? kInfinity : 0.0f;
  }
}

}  // namespace fused_attention::cuda::sm80
