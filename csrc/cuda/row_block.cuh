// SPDX-License-Identifier: Apache-2.0
// The rows that a block of threads computes.
#pragma once
#include "mask.cuh"

namespace fused_attention::cuda {

FA_DEVICE uint16_t* head_of(const StridedTensor& tensor, int batch, int head) {
  return static_cast<uint16_t*>(tensor.data) + batch * tensor.batch + head * tensor.head;
}

// Index of the sequence's first row, of a head, in lse and in whatever has its shape.
FA_DEVICE int64_t statistics_of(const AttentionProblem& problem, const Sequence& sequence, int batch, int head) {
  const bool packed = problem.cu_seqlens_q != nullptr;
  const int64_t line = packed ? head : batch * problem.num_heads + head, length = packed ? problem.num_tokens_q : problem.seqlen_q;
  return line * length + sequence.first_row;
}

// The rows of one sequence and head that a block of threads computes.
template <int BLOCK_M>
struct RowBlock {
  int batch, head, start_m;
  Sequence sequence;

  FA_DEVICE RowBlock(const AttentionProblem& problem, uint32_t number) : RowBlock(problem, number, row_blocks_of(problem)) {}

  FA_DEVICE uint16_t* rows_of(const StridedTensor& tensor) const {
    return head_of(tensor, batch, head) + (sequence.first_row + start_m) * tensor.row;
  }
  FA_DEVICE const uint16_t* keys_of(const StridedTensor& tensor, int key_head) const {
    return head_of(tensor, batch, key_head) + sequence.first_key * tensor.row;
  }
  FA_DEVICE int64_t statistics(const AttentionProblem& problem) const { return statistics_of(problem, sequence, batch, head) + start_m; }

 private:
  static FA_DEVICE uint32_t row_blocks_of(const AttentionProblem& problem) {
    return static_cast<uint32_t>((problem.seqlen_q + BLOCK_M - 1) / BLOCK_M);
  }
  FA_DEVICE RowBlock(const AttentionProblem& problem, uint32_t number, uint32_t row_blocks)
      : batch(static_cast<int>(number / row_blocks / static_cast<uint32_t>(problem.num_heads))),
        head(static_cast<int>(number / row_blocks % static_cast<uint32_t>(problem.num_heads))),
        start_m(static_cast<int>(row_blocks - 1 - number % row_blocks) * BLOCK_M),  // the longest causal rows first
        sequence(problem, batch) {}
};

}  // namespace fused_attention::cuda
