// SPDX-License-Identifier: Apache-2.0
// The gradients of query, for compute capability 8.0 and newer. A block computes BLOCK_M rows of one head against all the keys that they
// see, in the forward's order. dquery = scale * dscores K; no atomics, so every run gives the same bits.
//
// Along the way it stores the gradients of scores as those of a float mask, and sums them over keys for masks of one column and for slopes.
#pragma once
#include "../gradients.cuh"
#include "backward_tiles.cuh"

namespace fused_attention::cuda::sm80 {

struct BackwardQuery : BackwardTiles {
  static_assert(kBlockM == 16 * kWarps && kBlockM == kKeysPerTile);
  static_assert(kKeysPerTile % kBlockN == 0 && kBlockN % 32 == 0);

  struct SharedMemory {
    QueryTile q;  // at the end dquery, then parts of a slope's gradient
    GradientTile dout;
    KeyTile k[kStages];
    ValueTile v[kStages];
  };

  static FA_DEVICE void run(const BackwardArguments& arguments);
};

FA_DEVICE void BackwardQuery::run(const BackwardArguments& arguments) {
  auto& shared = shared_memory<BackwardQuery>();
  const AttentionProblem& problem = arguments.problem;
  const RowBlock<kBlockM> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  if (block.start_m >= sequence.rows) return;
  const int key_head = block.head / arguments.heads_per_group;
  const uint16_t* const key = block.keys_of(problem.key, key_head);      // (Lk, Dqk)
  const uint16_t* const value = block.keys_of(problem.value, key_head);  // (Lk, Dv)
  const auto blocks = key_blocks<kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, block.batch, block.head, block.start_m);
  const ScoreMask mask{sequence, problem, block.batch, block.head};
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, first_row = block.start_m + warp_row;
  const float* const row_lse = arguments.row_lse + block.statistics(problem);      // (Lq - start_m,)
  const float* const row_delta = arguments.row_delta + block.statistics(problem);  // (Lq - start_m,)

  // Loads: every call is one group of cp.async, an empty one past the last block.
  const auto load = [&](int step) {
    if (step < blocks.num_blocks) {
      const int start_n = blocks.start(step), keys_left = sequence.keys_present - start_n;
      const bool all_of_mask = kPlain || step < blocks.num_full || problem.key_mask == nullptr;
      const auto exists = [&](int row) { return all_of_mask ? row < keys_left : mask.key_exists(start_n + row); };
      const int slot = step % kStages;
      copy_rows_async<kThreads>(shared.k[slot], key + start_n * problem.key.row, problem.key.row, static_cast<int>(problem.head_dim_qk),
                                threadIdx.x, exists);
      copy_rows_async<kThreads>(shared.v[slot], value + start_n * problem.value.row, problem.value.row,
                                static_cast<int>(problem.head_dim_v), threadIdx.x, exists);
    }
    ptx::cp_async_commit();
  };
  copy_rows_async<kThreads>(shared.q, block.rows_of(problem.query), problem.query.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                            [&](int row) { return block.start_m + row < sequence.rows_present; });
  // Rows that attend to nothing may have any gradient.
  copy_rows_async<kThreads>(shared.dout, block.rows_of(problem.dout), problem.dout.row, static_cast<int>(problem.head_dim_v), threadIdx.x,
                            [&](int row) { return block.start_m + row < sequence.rows_present && row_lse[row] != kInfinity; });
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) load(stage);

  float lse[2], delta[2];  // of rows lane / 4 and 8 below
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + 8 * half + lane / 4;
    const bool present = block.start_m + row < sequence.rows_present;
    lse[half] = present ? row_lse[row] : kInfinity;
    delta[half] = present ? row_delta[row] : 0.0f;
  }
  const auto q_lane = shared.q.by_rows(warp_row);
  const auto do_lane = shared.dout.by_rows(warp_row);
  const auto k_columns = shared.k[0].by_columns();
  const auto v_columns = shared.v[0].by_columns();
  const auto k_rows = shared.k[0].by_rows();
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;
  Accumulators<1, kHeadDimQk / 8> acc = {};
  ScoreGradientSums sums;

  const auto step_over = [&](int step, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int start_n = blocks.start(step), slot = step % kStages;
    ptx::cp_async_wait<kStages - 1>();  // this block has landed
    __syncthreads();

    // S = Q K^T and dP = dO V^T (BLOCK_M, BLOCK_N), each warp its own rows.
    Accumulators<1, kBlockN / 8> scores, gradients;
    [[maybe_unused]] Accumulators<1, kBlockN / 8> softcap_derivative;
    multiply_transposed<kDtype>(scores, q_lane, k_columns[slot]);
    multiply_transposed<kDtype>(gradients, do_lane, v_columns[slot]);

    // P and dS
    const ScoreGradientStep<kClass, false> of_scores{arguments, mask, first_row, start_n, drops, lane};
    const float scale = of_scores.transform(scores, softcap_derivative);
    if constexpr (kMasked) of_scores.mask(scores);
    of_scores.to_weights(scores, scale, [&](int, int, int e) { return lse[e / 2]; });
    of_scores.template to_gradients<kMasked>(gradients, scores, [&](int, int, int e) { return delta[e / 2]; });
    if constexpr (kBias) {
      if (arguments.dattn_mask.data != nullptr) {
        store_mask_gradient(arguments, gradients, block.batch, block.head, first_row, sequence.rows, start_n);
      }
      if (arguments.row_sums != nullptr) sums.add_lines(gradients);
    }
    if constexpr (!kPlain) {
      if (arguments.slope_sums != nullptr) sums.add_slope(gradients, of_scores);
    }
    of_scores.through_softcap(gradients, softcap_derivative);

    // dQ += dS K (BLOCK_M, HEAD_DIM_QK)
    multiply_add<kDtype>(acc, gradients, k_rows[slot]);
    __syncthreads();  // every warp is past its products with this block
    load(step + kStages);
  };
  blocks.for_each(step_over);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q has landed and was read

  const int rows = sequence.rows - block.start_m;
  store_rows<kDtype>(acc, problem.softmax_scale, shared.q, warp_row, rows, block.rows_of(problem.dquery), problem.dquery.row,
                     static_cast<int>(problem.head_dim_qk));
  if constexpr (kBias) {
    if (arguments.row_sums != nullptr) sums.store_lines(arguments.row_sums + block.statistics(problem) + warp_row, rows - warp_row);
  }
  if (arguments.slope_sums != nullptr) {
    __syncthreads();  // dquery was stored from shared memory
    store_slope_part<kThreads / 32>(arguments, block, sums.slope, threadIdx.x / 32, &shared);
  }
}

}  // namespace fused_attention::cuda::sm80
