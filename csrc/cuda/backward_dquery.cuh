// SPDX-License-Identifier: Apache-2.0
// After backward.cuh: dquery = scale * the sums over the blocks of keys.
#pragma once
#include "backward_arguments.h"
#include "row_block.cuh"

namespace fused_attention::cuda {

// For ROWS rows of one head, packed sequences one after the other: eight lanes per row, 128 threads.
template <Dtype DTYPE, int ROWS>
FA_DEVICE void backward_dquery(const OnePassArguments& arguments) {
  constexpr int kLanes = 8;
  const AttentionProblem& problem = arguments.problem;
  const int64_t length = problem.cu_seqlens_q != nullptr ? problem.num_tokens_q : problem.seqlen_q;
  const auto row_blocks = static_cast<uint32_t>((length + ROWS - 1) / ROWS), num_heads = static_cast<uint32_t>(problem.num_heads);
  const uint32_t line = blockIdx.x / row_blocks;
  const int head = static_cast<int>(line % num_heads), batch = static_cast<int>(line / num_heads), lane = threadIdx.x % kLanes;
  const int64_t row = int64_t{blockIdx.x % row_blocks} * ROWS + threadIdx.x / kLanes;
  if (row >= length) return;
  const float* const sums = arguments.dquery_sums + (line * length + row) * problem.head_dim_qk;  // (Dqk,)
  uint16_t* const dquery = head_of(problem.dquery, batch, head) + row * problem.dquery.row;
  const float scale = problem.softmax_scale;
  for (int column = lane * kChunk; column < problem.head_dim_qk; column += kLanes * kChunk) {
    const float4 left = *reinterpret_cast<const float4*>(sums + column), right = *reinterpret_cast<const float4*>(sums + column + 4);
    uint4 packed;
    packed.x = ptx::pack<DTYPE>(left.x * scale, left.y * scale);
    packed.y = ptx::pack<DTYPE>(left.z * scale, left.w * scale);
    packed.z = ptx::pack<DTYPE>(right.x * scale, right.y * scale);
    packed.w = ptx::pack<DTYPE>(right.z * scale, right.w * scale);
    *reinterpret_cast<uint4*>(dquery + column) = packed;
  }
}

}  // namespace fused_attention::cuda
