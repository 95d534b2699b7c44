// SPDX-License-Identifier: Apache-2.0
// backward_query.cuh for head dims above 128: a block computes dquery of 64 rows of one head, two warps to 16 rows (warp_pairs.cuh).
//
//   the weights' warp:    S = Q K^T      -> P               wait for dS      dquery, left half of its columns  += dS K
//   the gradients' warp:  dP = dO V^T    wait for P -> dS                    dquery, right half                += dS K
//
// Q and dO stay in registers: K and V are all that is read from shared memory for each step.
#pragma once
#include "../gradients.cuh"
#include "backward_tiles.cuh"
#include "warp_pairs.cuh"

namespace fused_attention::cuda::sm80 {

template <class Row>
struct BackwardQueryPairsConfig : BackwardTiles<Row> {
  static_assert(Row::kThreads == kPairedThreads && Row::kBlockM == 16 * kPairs && Row::kBlockM == kKeysPerTile);
  static_assert(kKeysPerTile % Row::kBlockN == 0 && Row::kBlockN % 32 == 0 && Row::kStages >= 2);

  using Tiles = BackwardTiles<Row>;
  using LeftQuery = LeftOperand<Row::kBlockM, Row::kHeadDimQk, Row::kHeadDimQk>;
  using LeftGradient = LeftOperand<Row::kBlockM, Row::kHeadDimV, Row::kHeadDimV>;  // of dout
  using HalfTile = SharedTile<Row::kBlockM, Row::kHeadDimQk / 2>;                  // of dquery
  struct SharedMemory {
    union {
      struct {  // both are read before the first keys and values come to where they were
        typename Tiles::QueryTile::Memory q;
        typename Tiles::GradientTile::Memory dout;
      } rows;
      struct {
        typename Tiles::KeyTile::Memory k[Row::kStages];
        typename Tiles::ValueTile::Memory v[Row::kStages];
      } steps;
      typename HalfTile::Memory dquery[2];  // at the end, then parts of a slope's gradient
    };
    uint16_t gradients[Row::kBlockM * Row::kBlockN];  // of scores
    float weights[Row::kBlockM * Row::kBlockN];
    float derivative[Row::kPlain ? 0 : Row::kBlockM * Row::kBlockN];  // of softcap
  };
};

template <class Config>
FA_DEVICE void backward_query_pairs(const BackwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kStages = Config::kStages, kBlockN = Config::kBlockN, kBlocks = kBlockN / 8, kHalf = Config::kHeadDimQk / 2;
  constexpr bool kPlain = Config::kPlain, kBias = Config::kBias;
  using LeftQuery = typename Config::LeftQuery;
  using LeftGradient = typename Config::LeftGradient;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using HalfTile = typename Config::HalfTile;
  using SharedMemory = typename Config::SharedMemory;
  auto& shared = shared_memory<Config>();
  const uint32_t smem = ptx::shared_address(&shared);
  const uint32_t k_smem = smem + offsetof(SharedMemory, steps.k);  // STAGES x (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = smem + offsetof(SharedMemory, steps.v);  // STAGES x (BLOCK_N, HEAD_DIM_V)

  const AttentionProblem& problem = arguments.problem;
  const RowBlock<Config::kBlockM> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  if (block.start_m >= sequence.rows) return;
  const int key_head = block.head / arguments.heads_per_group;
  const auto blocks = key_blocks<Config::kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, block.batch, block.head, block.start_m);
  const ScoreMask mask{sequence, problem, block.batch, block.head};
  const WarpPair pair;
  const int warp_row = 16 * pair.number, first_row = block.start_m + warp_row;
  const float* const row_lse = arguments.row_lse + block.statistics(problem);  // (Lq - start_m,)

  const int rows = sequence.rows - block.start_m;
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;
  ScoreGradientSums sums;  // of the gradients' warps

  // What one of a pair's warps does.
  const auto walk = [&](auto of_weights) {
    constexpr bool kWeights = decltype(of_weights)::value;
    using Left = std::conditional_t<kWeights, LeftQuery, LeftGradient>;
    using RightTile = std::conditional_t<kWeights, KeyTile, ValueTile>;
    const StridedTensor& rows_of = kWeights ? problem.query : problem.dout;
    const StridedTensor& keys_of = kWeights ? problem.key : problem.value;
    const uint16_t* const source = block.keys_of(keys_of, block.head / arguments.heads_per_group);  // (Lk, Dqk) or (Lk, Dv)
    const int columns = static_cast<int>(kWeights ? problem.head_dim_qk : problem.head_dim_v);
    const uint32_t left_smem = kWeights ? smem + offsetof(SharedMemory, rows.q) : smem + offsetof(SharedMemory, rows.dout);
    // Rows that attend to nothing may have any gradient.
    Left::copy(left_smem, 0, block.rows_of(rows_of), rows_of.row, columns, threadIdx.x % (kPairedThreads / 2),
               [&](int row) { return block.start_m + row < sequence.rows_present && (kWeights || row_lse[row] != kInfinity); });
    ptx::cp_async_commit();
    // Loads: every call is one group of cp.async, an empty one past the last block. Each half of the block's threads loads one tensor.
    const auto load = [&](int step) {
      if (step < blocks.num_blocks) {
        const int start_n = blocks.start(step), keys_left = sequence.keys_present - start_n;
        const bool all_of_mask = kPlain || step < blocks.num_full || problem.key_mask == nullptr;
        copy_rows_async<RightTile, kPairedThreads / 2>(
            (kWeights ? k_smem : v_smem) + step % kStages * RightTile::kBytes, source + start_n * keys_of.row, keys_of.row, columns,
            ptx::again(threadIdx.x) % (kPairedThreads / 2),
            [&](int row) { return all_of_mask ? row < keys_left : mask.key_exists(start_n + row); });
      }
      ptx::cp_async_commit();
    };
    Left left;
    ptx::cp_async_wait<0>();
    __syncthreads();
    left.hold(left_smem, 0, warp_row);
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
    const auto k_columns = LaneAddress<KeyTile>::by_columns(k_smem);
    const auto v_columns = LaneAddress<ValueTile>::by_columns(v_smem);
    const auto k_rows = LaneAddress<KeyTile>::by_rows(k_smem);
    Accumulators<1, kHalf / 8> acc = {};

    const auto step_over = [&](int step, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      const int start_n = blocks.start(step), slot = step % kStages;
      ptx::cp_async_wait<kStages - 2>();  // this block has landed
      __syncthreads();                    // and every warp is past the one before
      load(step + kStages - 1);

      // S = Q K^T or dP = dO V^T (BLOCK_M, BLOCK_N), each pair its own rows.
      Accumulators<1, kBlocks> scores;
      const ScoreGradientStep<Config::kClass, false> of_scores{arguments, mask, first_row, start_n, drops, pair.lane};
      const auto of_row = [&](int, int, int e) { return statistic[e / 2]; };
      if constexpr (kWeights) {
        multiply_transposed<kDtype, Config::kHeadDimQk / 16>(scores, left, LaneAddress<KeyTile>{k_columns.first + slot * KeyTile::kBytes});
        Accumulators<1, kBlocks> softcap_derivative;
        const float scale = of_scores.transform(scores, softcap_derivative, [&] { pair.put(shared.derivative, softcap_derivative); });
        if constexpr (kMasked) of_scores.mask(scores);
        of_scores.to_weights(scores, scale, of_row);
        pair.put(shared.weights, scores);
        pair.announce(kWeightsReady);
        pair.await(kGradientsReady);
      } else {
        multiply_transposed<kDtype, Config::kHeadDimV / 16>(scores, left,
                                                            LaneAddress<ValueTile>{v_columns.first + slot * ValueTile::kBytes});
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
      multiply_add_packed<kDtype, kWeights ? 0 : kHalf / 16>(acc, a, LaneAddress<KeyTile>{k_rows.first + slot * KeyTile::kBytes});
    };
    blocks.for_each(step_over);
    ptx::cp_async_wait<0>();
    __syncthreads();  // every warp is past its products

    constexpr int kFirstColumn = kWeights ? 0 : kHalf;
    store_rows<kDtype, HalfTile>(acc, problem.softmax_scale, shared.dquery[kWeights ? 0 : 1].bytes, warp_row, rows,
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
