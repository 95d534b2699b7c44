// SPDX-License-Identifier: Apache-2.0
// The two numbers per row that the backward kernels need: lse in log2 units, and delta = rowsum(dout * out) - dlse. Also clears what
// backward.cuh adds to.
#pragma once
#include "gradients.cuh"
#include "row_block.cuh"

namespace fused_attention::cuda {

// For ROWS rows of one head, packed sequences one after the other: eight lanes per row, 128 threads.
template <Dtype DTYPE, int ROWS>
FA_DEVICE void backward_delta(const OnePassArguments& arguments) {
  constexpr int kLanes = 8, kThreads = 128;
  static_assert(ROWS == kThreads / kLanes);
  const AttentionProblem& problem = arguments.problem;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < arguments.num_turns; i += int64_t{gridDim.x} * kThreads) {
    arguments.turns[i] = 0;
  }
  const bool packed = problem.cu_seqlens_q != nullptr;
  const int64_t length = packed ? problem.num_tokens_q : problem.seqlen_q;
  const auto row_blocks = static_cast<uint32_t>((length + ROWS - 1) / ROWS), num_heads = static_cast<uint32_t>(problem.num_heads);
  const uint32_t line = blockIdx.x / row_blocks;
  const int head = static_cast<int>(line % num_heads), batch = static_cast<int>(line / num_heads), lane = threadIdx.x % kLanes;
  const int64_t row = int64_t{blockIdx.x % row_blocks} * ROWS + threadIdx.x / kLanes, place = line * length + row;
  const float lse = row < length ? problem.lse[place] : -kInfinity;
  const bool attends = lse != -kInfinity;
  if (arguments.dquery_sums != nullptr && row < length) {
    float* const sums = arguments.dquery_sums + place * problem.head_dim_qk;
    for (int column = 4 * lane; column < problem.head_dim_qk; column += 4 * kLanes) {
      *reinterpret_cast<float4*>(sums + column) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  const uint16_t* const out = head_of(problem.out, batch, head) + row * problem.out.row;
  const uint16_t* const dout = head_of(problem.dout, batch, head) + row * problem.dout.row;
  float sum = 0.0f;
  for (int column = lane * kChunk; attends && column < problem.head_dim_v; column += kLanes * kChunk) {
    sum = add_dot<DTYPE>(sum, *reinterpret_cast<const uint4*>(out + column), *reinterpret_cast<const uint4*>(dout + column));
  }
  sum = sum_of_lanes<kLanes>(sum);
  if (lane == 0 && row < length) {
    if (attends && problem.dlse != nullptr) sum -= problem.dlse[place];
    arguments.row_lse[place] = attends ? lse * kLog2E : kInfinity;
    arguments.row_delta[place] = attends ? sum : 0.0f;
  }
}

}  // namespace fused_attention::cuda
