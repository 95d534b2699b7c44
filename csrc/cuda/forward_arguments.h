// SPDX-License-Identifier: Apache-2.0
// The only parameter of the forward and decoding kernels on a GPU; filled by a family's plan.cpp, read by the kernels as a grid constant.
#pragma once
#include "../problem.h"

namespace fused_attention::cuda {

constexpr int kKeysPerTile = 64;  // of the tiles in tile lists
constexpr int kKeysPerWord = 32;  // of mask bits
constexpr int kRowsPerWarp = 16;  // of the single-tile kernels; or keys

enum class FeatureClass : int {
  plain = 0,   // full, causal and window, by loop bounds
  masked = 1,  // and everything else but a float mask, as branches that are uniform in a block
  bias = 2,    // and a float attn_mask
};

// The kernels for sequences whose keys are a single tile: a block is cut into groups of warps, each of which takes one unit of work.
//   forward   one 16-row piece per warp, of the query heads that share a key head, against all keys
//   backward  all rows of those heads, and all keys, 16 per warp
struct SingleTileUnits {
  uint32_t count = 0;               // of the whole problem
  int32_t per_key_head = 1;         // of a batch element
  int32_t warps = 1;                // of a group
  int32_t shared_bytes = 0;         // of a group
  int32_t row_tiles_in_flight = 1;  // backward: 32 rows of query and dout each, in shared memory
};

struct ForwardArguments {
  AttentionProblem problem;  // attn_mask is a float mask or absent: a bool one has become mask_bits and tiles

  // score = product * score_scale, then with a softcap tanh(score) * softcap_log2: log2 units, so that exp2 follows.
  float score_scale = 0.0f;     // softmax_scale * log2(e), or softmax_scale / softcap
  float softcap_log2 = 0.0f;    // softcap * log2(e)
  int32_t heads_per_group = 1;  // query heads to a key head
  float kept_scale = 1.0f;      // of weights that dropout keeps
  TileLists tiles;              // of the kernel's own BLOCK_M rows; null: loop bounds say which key blocks to visit

  // Decoding: each block of rows is computed num_splits times, each over its share of the key blocks, and combined afterwards.
  int32_t num_splits = 1;
  float* partial_out = nullptr;  // (num_splits, B, Hq, Lq, Dv), normalized
  float* partial_lse = nullptr;  // (num_splits, B, Hq, Lq)

  SingleTileUnits units;
};

}  // namespace fused_attention::cuda
