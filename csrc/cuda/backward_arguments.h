// SPDX-License-Identifier: Apache-2.0
// The only parameter of the backward kernels on a GPU; filled by a family's plan.cpp, read by the kernels as a grid constant.
#pragma once
#include "forward_arguments.h"

namespace fused_attention::cuda {

constexpr int kRowsPerSlopePart = 64;

struct BackwardArguments : ForwardArguments {  // tiles: of 64 rows
  TileLists column_tiles;                      // the tiles of 64 rows that visit each 64 keys, listed like `tiles`; may be null

  // Workspace, (B, Hq, Lq) like lse: lse in log2 units and rowsum(dout * out) - dlse; +inf and 0 if a row attends to nothing.
  float *row_lse = nullptr, *row_delta = nullptr;

  StridedTensor dattn_mask;                  // (B or 1, Hq or 1, Lq, Lk) in the dtype of attn_mask, contiguous along keys; data may be null
  int64_t mask_batches = 1, mask_heads = 1;  // B or 1 and Hq or 1
  float* row_sums = nullptr;                 // (B, Hq, Lq) gradients of scores summed over keys; may be null
  float* column_sums = nullptr;              // (B, Hq, Lk) summed over rows; may be null
  float* slope_sums = nullptr;  // (B, Hq, ceil(Lq / 64)) gradients of the slopes from 64 rows each, or all of it at 0; may be null
};

struct OnePassArguments : BackwardArguments {  // of backward.cuh and the kernels before and after it
  float* dquery_sums = nullptr;                // (B, Hq, Lq, Dqk) contiguous, over all keys and not yet scaled; backward_delta clears it

  // Null if blocks of keys may add in any order. A ticket counter, then (B, Hq, turns_per_head): for each BLOCK_M rows, how many blocks of
  // keys have added to them. backward_delta clears them.
  uint32_t* turns = nullptr;
  int64_t turns_per_head = 0, num_turns = 0;  // num_turns includes the ticket counter
};

}  // namespace fused_attention::cuda
