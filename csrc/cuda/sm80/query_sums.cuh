// SPDX-License-Identifier: Apache-2.0
// A block's share of dquery in backward.cuh: dscores K for a tile of rows and the block's keys, added to float32 sums in global memory.
#pragma once
#include "../tile.cuh"

namespace fused_attention::cuda::sm80 {

// The part of the product (BLOCK_M x HEAD_DIM) that a warp computes: 32 rows, or 16 if the columns do not divide evenly, and every
// kColumnGroups-th 16 columns.
template <int BLOCK_M, int HEAD_DIM, int NUM_WARPS>
struct QueryPart {
  static constexpr bool kTall = NUM_WARPS % (BLOCK_M / 32) == 0 && HEAD_DIM % (16 * NUM_WARPS / (BLOCK_M / 32)) == 0;
  static constexpr int kMatrices = kTall ? 2 : 1, kRowGroups = BLOCK_M / (16 * kMatrices), kColumnGroups = NUM_WARPS / kRowGroups;
  static constexpr int kBlocks = HEAD_DIM / 8 / kColumnGroups;
  static_assert(kRowGroups * kColumnGroups == NUM_WARPS && kBlocks % 2 == 0 && (kColumnGroups & (kColumnGroups - 1)) == 0);

  int row_group, column_group;

  FA_DEVICE explicit QueryPart(int warp) : row_group(warp % kRowGroups), column_group(warp / kRowGroups) {}
  FA_DEVICE int first_row() const { return 16 * kMatrices * row_group; }
  FA_DEVICE int column(int block) const { return 16 * (column_group + kColumnGroups * (block / 2)) + 8 * (block % 2); }
};

// part = dscores K. scores: dscores transposed (BLOCK_N, BLOCK_M), from the warp's rows on; keys: (BLOCK_N, HEAD_DIM), from its columns on.
template <Dtype DTYPE, class Part, class ScoreTile, class KeyTile>
FA_DEVICE void multiply_scores_keys(Accumulators<Part::kMatrices, Part::kBlocks>& part, const LaneAddress<ScoreTile>& scores,
                                    const LaneAddress<KeyTile>& keys) {
#pragma unroll
  for (int step = 0; step < KeyTile::kRows / 16; ++step) {
    uint32_t a[Part::kMatrices][4];
#pragma unroll
    for (int m = 0; m < Part::kMatrices; ++m) ptx::ldmatrix_x4_trans(a[m], scores.at(16 * step, m));
#pragma unroll
    for (int n = 0; n < Part::kBlocks; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, keys.at(16 * step, Part::kColumnGroups * (n / 2)));
#pragma unroll
      for (int m = 0; m < Part::kMatrices; ++m) multiply_step<DTYPE>(part[m], n, a[m], b, step == 0);
    }
  }
}

// sums: row 0 of the tile, (rows_left, columns) contiguous; rows and columns past them are left alone.
//
// A lane holds two columns of row g = lane / 4, so eight lanes hold two rows of 32 bytes. To add whole rows of 32 bytes per instruction,
// lanes of even g trade their right column for the left one of the row below, and lanes of odd g the other way around.
template <class Part>
FA_DEVICE void add_to_sums(const Accumulators<Part::kMatrices, Part::kBlocks>& part, const Part& place, float* sums, int rows_left,
                           int columns) {
  const int lane = threadIdx.x % 32, odd = lane / 4 % 2, first_row = place.first_row() + lane / 8 * 2;
  sums += first_row * columns + 2 * (lane % 4) + odd;
#pragma unroll
  for (int m = 0; m < Part::kMatrices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half;
      float* const upper = sums + row * columns;
      const bool has_upper = first_row + row < rows_left, has_lower = first_row + row + 1 < rows_left;
#pragma unroll
      for (int n = 0; n < Part::kBlocks; ++n) {
        const float left = part[m][n][2 * half], right = part[m][n][2 * half + 1];
        const float other = __shfl_xor_sync(0xffffffff, odd ? left : right, 4);
        const int column = place.column(n);
        if (column >= columns) continue;
        if (has_upper) ptx::red_add(upper + column, odd ? other : left);
        if (has_lower) ptx::red_add(upper + columns + column, odd ? right : other);
      }
    }
  }
}

}  // namespace fused_attention::cuda::sm80
