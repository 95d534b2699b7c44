// SPDX-License-Identifier: Apache-2.0
// backward_query.cuh for head dims above 128: a block computes dquery of 64 rows of one head, two warps per 16 rows (warp_pairs.cuh).
//
//   the weights' warp:    S = Q K^T      -> P               wait for dS      dquery, left half of its columns  += dS K
//   the gradients' warp:  dP = dO V^T    wait for P -> dS                    dquery, right half                += dS K
//
// Q and dO stay in registers: a step reads only K and V from shared memory.
#pragma once
#include "../gradients.cuh"
#include "backward_tiles.cuh"
#include "warp_pairs.cuh"

namespace fused_attention::cuda::sm80 {

struct BackwardQueryPairs : BackwardTiles {
  static_assert(kThreads == kPairedThreads && kBlockM == 16 * kPairs && kBlockM == kKeysPerTile);
  static_assert(kKeysPerTile % kBlockN == 0 && kBlockN % 32 == 0 && kStages >= 2);

  static constexpr int kBlocks = kBlockN / 8, kHalf = kHeadDimQk / 2;
  using LeftQuery = LeftOperand<kBlockM, kHeadDimQk, kHeadDimQk>;
  using LeftGradient = LeftOperand<kBlockM, kHeadDimV, kHeadDimV>;  // of dout
  struct SharedMemory {
    union {
      struct {  // both are read before the first keys and values overwrite them
        QueryTile q;
        GradientTile dout;
      } rows;
      struct {
        KeyTile k[kStages];
        ValueTile v[kStages];
      } steps;
      SharedTile<kBlockM, kHalf> dquery[2];  // at the end: its left and right half; then parts of a slope's gradient
    };
    uint16_t gradients[kBlockM * kBlockN];  // of scores
    float weights[kBlockM * kBlockN];
    float derivative[kPlain ? 0 : kBlockM * kBlockN];  // of softcap
  };

  static FA_DEVICE void run(const BackwardArguments& arguments);
};

FA_DEVICE void BackwardQueryPairs::run(const BackwardArguments& arguments) {
  auto& shared = shared_memory<BackwardQueryPairs>();
  const WarpPair pair;
  const AttentionProblem& problem = arguments.problem;
  const RowBlock<kBlockM> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  if (block.start_m >= sequence.rows) return;
  const auto blocks = key_blocks<kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, block.batch, block.head, block.start_m);
  const ScoreMask mask{sequence, problem, block.batch, block.head};
  const int warp_row = 16 * pair.number, first_row = block.start_m + warp_row;
  const float* const row_lse = arguments.row_lse + block.statistics(problem);  // (Lq - start_m,)

  const int rows = sequence.rows - block.start_m;
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;
  ScoreGradientSums sums;  // of the gradients' warps

  // The work of one warp of a pair.
  const auto walk = [&](auto of_weights) {
    constexpr bool kWeights = decltype(of_weights)::value;
    std::conditional_t<kWeights, LeftQuery, LeftGradient> left;
    auto& left_tile = either<kWeights>(shared.rows.q, shared.rows.dout);
    auto& right_tiles = either<kWeights>(shared.steps.k, shared.steps.v);
    const StridedTensor& rows_of = kWeights ? problem.query : problem.dout;
    const StridedTensor& keys_of = kWeights ? problem.key : problem.value;
    const uint16_t* const source = block.keys_of(keys_of, block.head / arguments.heads_per_group);  // (Lk, Dqk) or (Lk, Dv)
    const int columns = static_cast<int>(kWeights ? problem.head_dim_qk : problem.head_dim_v);
    // Rows that attend to nothing may have any gradient.
    left.copy(left_tile, nullptr, block.rows_of(rows_of), rows_of.row, columns, threadIdx.x % (kPairedThreads / 2),
              [&](int row) { return block.start_m + row < sequence.rows_present && (kWeights || row_lse[row] != kInfinity); });
    ptx::cp_async_commit();
    // Loads: every call is one group of cp.async, an empty one past the last block. Each half of the block's threads loads one tensor.
    const auto load = [&](int step) {
      if (step < blocks.num_blocks) {
        const int start_n = blocks.start(step), keys_left = sequence.keys_present - start_n;
        const bool all_of_mask = kPlain || step < blocks.num_full || problem.key_mask == nullptr;
        copy_rows_async<kPairedThreads / 2>(right_tiles[step % kStages], source + start_n * keys_of.row, keys_of.row, columns,
                                            ptx::again(threadIdx.x) % (kPairedThreads / 2),
                                            [&](int row) { return all_of_mask ? row < keys_left : mask.key_exists(start_n + row); });
      }
      ptx::cp_async_commit();
    };
    ptx::cp_async_wait<0>();
    __syncthreads();
    left.hold(left_tile, nullptr, warp_row);
    __syncthreads();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
    const float* const row_delta = arguments.row_delta + block.statistics(problem);
    float statistic[2];  // lse or delta, of rows lane / 4 and 8 below
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 8 * half + pair.lane / 4;
      const bool present = block.start_m + row < sequence.rows_present;
      statistic[half] = present ? (kWeights ? row_lse : row_delta)[row] : kWeights ? kInfinity : 0.0f;
    }
    const auto k_columns = shared.steps.k[0].by_columns();
    const auto v_columns = shared.steps.v[0].by_columns();
    const auto k_rows = shared.steps.k[0].by_rows();
    Accumulators<1, kHalf / 8> acc = {};

    const auto step_over = [&](int step, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      const int start_n = blocks.start(step), slot = step % kStages;
      ptx::cp_async_wait<kStages - 2>();  // this block has landed
      __syncthreads();                    // and every warp is past the one before
      load(step + kStages - 1);

      // S = Q K^T or dP = dO V^T (BLOCK_M, BLOCK_N), each pair its own rows.
      Accumulators<1, kBlocks> scores;
      const ScoreGradientStep<kClass, false> of_scores{arguments, mask, first_row, start_n, drops, pair.lane};
      const auto of_row = [&](int, int, int e) { return statistic[e / 2]; };
      if constexpr (kWeights) {
        multiply_transposed<kDtype>(scores, left, k_columns[slot]);
        Accumulators<1, kBlocks> softcap_derivative;
        const float scale = of_scores.transform(scores, softcap_derivative, [&] { pair.put(shared.derivative, softcap_derivative); });
        if constexpr (kMasked) of_scores.mask(scores);
        of_scores.to_weights(scores, scale, of_row);
        pair.put(shared.weights, scores);
        pair.announce(kWeightsReady);
        pair.await(kGradientsReady);
      } else {
        multiply_transposed<kDtype>(scores, left, v_columns[slot]);
        Accumulators<1, kBlocks> others;
        pair.await(kWeightsReady);
        pair.take(shared.weights, others);
        of_scores.template to_gradients<kMasked>(scores, others, of_row);
        if constexpr (kBias) {
          if (arguments.dattn_mask.data != nullptr) {
            store_mask_gradient(arguments, scores, block.batch, block.head, first_row, sequence.rows, start_n);
          }
          if (arguments.row_sums != nullptr) sums.add_lines(scores);
        }
        if constexpr (!kPlain) {
          if (arguments.slope_sums != nullptr) sums.add_slope(scores, of_scores);
        }
        of_scores.through_softcap(scores, others, [&] { pair.take(shared.derivative, others); });
      }

      // dQ += dS K (BLOCK_M, HEAD_DIM_QK / 2)
      uint4* const exchanged = reinterpret_cast<uint4*>(shared.gradients) + pair.number * (kBlocks / 2) * 32 + pair.lane;
      uint32_t a[kBlocks / 2][4];
#pragma unroll
      for (int i = 0; i < kBlocks / 2; ++i) {
        if constexpr (kWeights) {
          const uint4 four = exchanged[i * 32];
          a[i][0] = four.x, a[i][1] = four.y, a[i][2] = four.z, a[i][3] = four.w;
        } else {
          pack_operand<kDtype>(a[i], scores, i);
          exchanged[i * 32] = {a[i][0], a[i][1], a[i][2], a[i][3]};
        }
      }
      if constexpr (!kWeights) pair.announce(kGradientsReady);
      multiply_add_packed<kDtype, kWeights ? 0 : kHalf / 16>(acc, a, k_rows[slot]);
    };
    blocks.for_each(step_over);
    ptx::cp_async_wait<0>();
    __syncthreads();  // every warp is past its products

    constexpr int kFirstColumn = kWeights ? 0 : kHalf;
    store_rows<kDtype>(acc, problem.softmax_scale, shared.dquery[kWeights ? 0 : 1], warp_row, rows,
                       block.rows_of(problem.dquery) + kFirstColumn, problem.dquery.row,
                       static_cast<int>(problem.head_dim_qk) - kFirstColumn);
    if constexpr (kBias && !kWeights) {
      if (arguments.row_sums != nullptr) sums.store_lines(arguments.row_sums + block.statistics(problem) + warp_row, rows - warp_row);
    }
  };
  if (pair.has_weights) {
    walk(std::true_type());
  } else {
    walk(std::false_type());
  }
  if constexpr (!kPlain) {
    if (arguments.slope_sums != nullptr) {
      __syncthreads();  // dquery was stored from shared memory
      store_slope_part<kPairs>(arguments, block, sums.slope, pair.has_weights ? kPairs : pair.number, &shared);
    }
  }
}

}  // namespace fused_attention::cuda::sm80
