// SPDX-License-Identifier: Apache-2.0
// The only parameter of the pre-pass kernels (mask_tiles.cu), and the sizes of their results; filled by planner.cpp.
//
//   problem has                                      launches, in order
//   a bool attn_mask, and whatever else masks        mask_tiles_classify, mask_tiles_list     -> mask_bits, lists
//   a key_mask, with or without a float attn_mask    mask_tiles_keys                          -> lists
//   a PreparedMask, and BLOCK_M is 128               mask_tiles_merge                         -> lists
//   a PreparedMask, and BLOCK_M is 64                none: its lists are used as they are
//
// The forward then takes bits() as problem.mask_bits (with a bool attn_mask) and tiles() as its tiles.
#pragma once
#include <algorithm>

#include "forward_arguments.h"

namespace fused_attention::cuda {

constexpr int kMaskThreads = 256;  // per block, except in mask_tiles_classify, which has 2 * block_m

struct MaskArguments {
  // attn_mask is a bool one or absent. batch, num_heads and seqlen_q are the tensors' own.
  AttentionProblem problem;
  int32_t block_m = 64;     // rows of a tile, 64 or 128
  bool by_columns = false;  // mask_tiles_list: list the row blocks that visit each tile of keys

  // B', H' and Lq': 1 where the mask is the same for all batch elements, heads or rows.
  int64_t batch = 0, num_heads = 0, rows = 0;
  int64_t row_blocks = 0, key_tiles = 0, words = 0;  // ceil(Lq' / block_m), ceil(Lk / 64), ceil(Lk / 32)

  uint32_t* mask_bits = nullptr;  // (B', H', Lq', words): written by mask_tiles_classify
  uint8_t* kinds = nullptr;       // (B', H', row_blocks, key_tiles) of 0 empty, 1 full, 2 mixed: scratch
  int32_t* lists = nullptr;       // (B', H', row_blocks, 2 + key_tiles): written by every kernel but mask_tiles_classify

  MaskArguments() = default;
  // every_row: keep all rows even if they are the same, as lists by columns require.
  MaskArguments(const AttentionProblem& masked, int32_t rows_per_tile, bool every_row) : problem(masked), block_m(rows_per_tile) {
    if (problem.attn_mask_dtype != MaskDtype::boolean) problem.attn_mask = {};  // skips no tiles
    const StridedTensor& mask = problem.attn_mask;
    const bool prepared = problem.row_tiles.data != nullptr;
    const bool batches_differ =
        prepared ? problem.row_tiles.batch != 0
                 : mask.batch != 0 || problem.key_mask != nullptr || problem.key_lengths != nullptr || problem.query_lengths != nullptr;
    const bool heads_differ = prepared ? problem.row_tiles.head != 0 : mask.head != 0;
    const bool limited = problem.window_left < kUnlimited || problem.window_right < kUnlimited;
    const bool rows_differ = every_row || prepared || mask.row != 0 || limited;
    batch = batches_differ ? problem.batch : std::min<int64_t>(problem.batch, 1);
    num_heads = heads_differ ? problem.num_heads : std::min<int64_t>(problem.num_heads, 1);
    rows = rows_differ ? problem.seqlen_q : std::min<int64_t>(problem.seqlen_q, 1);
    row_blocks = (rows + block_m - 1) / block_m;
    key_tiles = (problem.seqlen_k + kKeysPerTile - 1) / kKeysPerTile;
    words = (problem.seqlen_k + 31) / 32;
  }

  int64_t mask_bits_bytes() const { return batch * num_heads * rows * words * 4; }
  int64_t kinds_bytes() const { return num_tiles(); }
  int64_t lists_bytes() const { return lines() * (2 + key_tiles) * 4; }

  BitMask bits() const {
    const int64_t head = rows * words;
    return {mask_bits, batch > 1 ? num_heads * head : 0, num_heads > 1 ? head : 0, rows > 1 ? words : 0};
  }
  TileLists tiles() const {
    const int64_t line = 2 + key_tiles, head = row_blocks * line;
    return {lists, batch > 1 ? num_heads * head : 0, num_heads > 1 ? head : 0, rows > 1 ? line : 0, static_cast<int32_t>(key_tiles)};
  }

  // By columns, with blocks of 64 rows: lines of (B', H', key_tiles, 2 + row_blocks).
  int64_t column_lists_bytes() const { return batch * num_heads * key_tiles * (2 + row_blocks) * 4; }
  TileLists column_tiles() const {
    const int64_t line = 2 + row_blocks, head = key_tiles * line;
    return {lists, batch > 1 ? num_heads * head : 0, num_heads > 1 ? head : 0, line, static_cast<int32_t>(row_blocks)};
  }

  // Grids are one-dimensional.
  int64_t classify_blocks() const { return num_tiles(); }
  int64_t list_blocks() const {  // of the others
    const int64_t num_lines = by_columns ? batch * num_heads * key_tiles : lines();
    return (num_lines + kMaskThreads / 32 - 1) / (kMaskThreads / 32);
  }
  int64_t num_tiles() const { return lines() * key_tiles; }

 private:
  int64_t lines() const { return batch * num_heads * row_blocks; }
};

}  // namespace fused_attention::cuda
