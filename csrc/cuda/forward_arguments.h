// SPDX-License-Identifier: Apache-2.0
// What every forward and decoding kernel on a GPU takes as its only parameter; made by plan.cpp, read by the kernels as a grid constant.
#pragma once
#include "../problem.h"

namespace fused_attention::cuda {

constexpr int kKeysPerTile = 64;  // of the tiles that lists name

enum class FeatureClass : int {
  plain = 0,   // full, causal and window, by loop bounds
  masked = 1,  // and lengths, packed sequences, key_mask, bits, alibi, softcap, sinks, as branches that a whole block takes
  bias = 2,    // and a float attn_mask
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
  float* partial_out = nullptr;  // (num_splits, B, Hq, Lq, Dv), normalised
  float* partial_lse = nullptr;  // (num_splits, B, Hq, Lq)
};

}  // namespace fused_attention::cuda
