// SPDX-License-Identifier: Apache-2.0
// The keys whose gradients a block of threads computes, and the rows that see them.
#pragma once
#include "row_block.cuh"

namespace fused_attention::cuda {

// The keys of one sequence and key head.
template <int BLOCK_N>
struct KeyBlock {
  int batch, key_head, start_n;
  Sequence sequence;
  int keys;  // of the sequence, in memory

  FA_DEVICE KeyBlock(const AttentionProblem& problem, uint32_t number)
      : KeyBlock(problem, number, static_cast<uint32_t>((problem.seqlen_k + BLOCK_N - 1) / BLOCK_N)) {}

  FA_DEVICE uint16_t* keys_of(const StridedTensor& tensor) const {
    return head_of(tensor, batch, key_head) + (sequence.first_key + start_n) * tensor.row;
  }

 private:
  FA_DEVICE KeyBlock(const AttentionProblem& problem, uint32_t number, uint32_t block_columns)
      : batch(static_cast<int>(number / block_columns / static_cast<uint32_t>(problem.num_heads_kv))),
        key_head(static_cast<int>(number / block_columns % static_cast<uint32_t>(problem.num_heads_kv))),
        start_n(static_cast<int>(number % block_columns) * BLOCK_N),
        sequence(problem, batch),
        keys(problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present) {}
};

// The rows that see, by position, the first and the last of BLOCK_N keys from start_n on. If a key does not exist, no block of rows counts
// as full.
template <int BLOCK_N>
struct SeeingRows {
  KeyRange of_first, of_last;
  bool no_keys;  // are present

  FA_DEVICE SeeingRows(const Sequence& sequence, int start_n, bool all_exist) {
    const int last_key = min(start_n + BLOCK_N, sequence.keys_present) - 1;
    of_first = sequence.rows_of(start_n), of_last = sequence.rows_of(last_key);
    no_keys = last_key < start_n;
    if (!all_exist) of_first.to = 0;
    if (no_keys || sequence.rows_present == 0) of_first = of_last = {0, 0};
  }
};

}  // namespace fused_attention::cuda
