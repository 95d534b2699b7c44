// SPDX-License-Identifier: Apache-2.0
// backward_key.cuh for head dims above 128: a block computes dkey and dvalue of 64 keys of one key head, two warps per
// 16 keys (warp_pairs.cuh).
//
//   the weights' warp:    S^T = K Q^T     -> P^T                   dvalue += P^T dO
//   the gradients' warp:  dP^T = V dO^T   wait for P^T -> dS^T     dkey   += dS^T Q
//
// Four products, none computed twice. K and V stay in registers if both fit next to the sums.
#pragma once
#include "../gradients.cuh"
#include "../key_block.cuh"
#include "backward_tiles.cuh"
#include "warp_pairs.cuh"

namespace fused_attention::cuda::sm80 {

struct BackwardKeyPairs : BackwardTiles {
  static_assert(kThreads == kPairedThreads && kBlockN == 16 * kPairs && kBlockN == kKeysPerTile);
  static_assert(kKeysPerTile % kBlockM == 0 && kBlockM % 16 == 0 && kStages >= 2);

  using LeftKey = LeftOperand<kBlockN, kHeadDimQk, kHeldQk>;
  using LeftValue = LeftOperand<kBlockN, kHeadDimV, kHeldV>;
  struct SharedMemory {
    union {
      struct {
        LeftKey::RestTile k[LeftKey::kRest == 0 ? 0 : 1];
        LeftValue::RestTile v[LeftValue::kRest == 0 ? 0 : 1];
        union {
          struct {  // what is held of K and V is read before the first rows overwrite it
            LeftKey::HeldTile k;
            LeftValue::HeldTile v;
          } held;
          struct {
            QueryTile q[kStages];
            GradientTile dout[kStages];
          } steps;
        };
      };
      struct {  // at the end
        KeyTile dkey;
        ValueTile dvalue;
      } sums;
    };
    float statistics[kStages * 2 * kBlockM];  // (STAGES, 2, BLOCK_M): lse and delta of each row
    float weights[kBlockM * kBlockN];
    float derivative[kPlain ? 0 : kBlockM * kBlockN];  // of softcap
  };

  static FA_DEVICE void run(const BackwardArguments& arguments);
};

FA_DEVICE void BackwardKeyPairs::run(const BackwardArguments& arguments) {
  auto& shared = shared_memory<BackwardKeyPairs>();
  const AttentionProblem& problem = arguments.problem;
  KeyBlock<kBlockN> block(problem, blockIdx.x);
  Sequence& sequence = block.sequence;
  sequence.window_right = min(sequence.window_right, kUnlimited);  // the same value, but read from the arguments it makes ptxas spill
  const int batch = block.batch, start_n = block.start_n;
  if (start_n >= block.keys) return;
  const WarpPair pair;
  const int warp_key = 16 * pair.number, first_key = start_n + warp_key;

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return key_mask.key_exists(start_n + row); };
  const bool all_exist = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const SeeingRows<kBlockN> rows(sequence, start_n, all_exist);
  const int keys_left = block.keys - start_n;
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;

  // The work of one warp of a pair.
  const auto walk = [&](auto of_weights) {
    constexpr bool kWeights = decltype(of_weights)::value;
    std::conditional_t<kWeights, LeftKey, LeftValue> left;
    auto& held = either<kWeights>(shared.held.k, shared.held.v);  // (BLOCK_N, HELD_QK) or (BLOCK_N, HELD_V)
    auto& rest = either<kWeights>(shared.k, shared.v);            // the columns to the right
    auto& row_tiles = either<kWeights>(shared.steps.q, shared.steps.dout);
    const StridedTensor &keys_of = kWeights ? problem.key : problem.value, &rows_of = kWeights ? problem.query : problem.dout;
    const int left_columns = static_cast<int>(kWeights ? problem.head_dim_qk : problem.head_dim_v);
    left.copy(held, rest, block.keys_of(keys_of), keys_of.row, left_columns, threadIdx.x % (kPairedThreads / 2), exists);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    left.hold(held, rest, warp_key);
    const auto q_columns = shared.steps.q[0].by_columns();
    const auto q_rows = shared.steps.q[0].by_rows();
    const auto do_columns = shared.steps.dout[0].by_columns();
    const auto do_rows = shared.steps.dout[0].by_rows();
    Accumulators<1, (kWeights ? kHeadDimV : kHeadDimQk) / 8> acc = {};

#pragma unroll 1
    for (int head = block.key_head * arguments.heads_per_group; head < (block.key_head + 1) * arguments.heads_per_group; ++head) {
      const VisitedBlocks<kBlockM, !kPlain> blocks(rows.of_first, rows.of_last, rows.no_keys, arguments.column_tiles, batch, head,
                                                   start_n / kBlockN);
      const ScoreMask mask{sequence, problem, batch, head};
      const uint16_t* const source = head_of(rows_of, batch, head) + sequence.first_row * rows_of.row;  // (Lq, Dqk) or (Lq, Dv)
      const int64_t place = statistics_of(problem, sequence, batch, head);
      const float* const row_lse = arguments.row_lse + place;                               // (Lq,)
      const float* const row_statistic = kWeights ? row_lse : arguments.row_delta + place;  // (Lq,)
      ScoreGradientSums sums;

      // Loads: every call is one group of cp.async, an empty one past the last block. Each half of the block's threads loads one tensor.
      const auto load = [&](int step) {
        if (step < blocks.num_blocks) {
          const uint32_t thread = ptx::again(threadIdx.x) % (kPairedThreads / 2);
          const int start_m = blocks.start(step), slot = step % kStages, rows_left = sequence.rows_present - start_m;
          const bool all_attend = kWeights || (!kBias && step < blocks.num_full);  // rows that attend to nothing may have any gradient
          copy_rows_async<kPairedThreads / 2>(
              row_tiles[slot], source + start_m * rows_of.row, rows_of.row, left_columns, thread,
              [&](int row) { return row < rows_left && (all_attend || row_lse[start_m + row] != kInfinity); });
          const int row = static_cast<int>(thread);
          if (row < kBlockM) {
            float* const target = shared.statistics + (2 * slot + (kWeights ? 0 : 1)) * kBlockM + row;
            if (row < rows_left) {
              ptx::cp_async_4(ptx::shared_address(target), row_statistic + start_m + row);
            } else {  // so that the weights of absent rows are 0
              *target = kWeights ? kInfinity : 0.0f;
            }
          }
        }
        ptx::cp_async_commit();
      };
      __syncthreads();  // every warp has its left operand, and is done with the previous head
#pragma unroll
      for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

      const auto step_over = [&](int step, auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        const int start_m = blocks.start(step), slot = step % kStages;
        ptx::cp_async_wait<kStages - 2>();  // this block has landed
        __syncthreads();                    // and every warp is past the one before
        load(step + kStages - 1);
        const float* const statistic = shared.statistics + (2 * slot + (kWeights ? 0 : 1)) * kBlockM;
        const auto of_row = [&](int, int n, int e) { return statistic[8 * n + 2 * (pair.lane % 4) + e % 2]; };

        // S^T = K Q^T or dP^T = V dO^T (BLOCK_N, BLOCK_M), each pair its own keys.
        Accumulators<1, kBlockM / 8> scores;
        const ScoreGradientStep<kClass, true> of_scores{arguments, mask, first_key, start_m, drops, pair.lane};
        if constexpr (kWeights) {
          multiply_transposed<kDtype>(scores, left, q_columns[slot]);
          Accumulators<1, kBlockM / 8> softcap_derivative;
          const float scale = of_scores.transform(scores, softcap_derivative, [&] { pair.put(shared.derivative, softcap_derivative); });
          if constexpr (kMasked) of_scores.mask(scores);
          of_scores.to_weights(scores, scale, of_row);
          pair.put(shared.weights, scores);
          pair.announce(kWeightsReady);
          if (drops) drop_marked(scores);
          // dV += P^T dO (BLOCK_N, HEAD_DIM_V)
          multiply_add<kDtype>(acc, scores, do_rows[slot]);
        } else {
          multiply_transposed<kDtype>(scores, left, do_columns[slot]);
          Accumulators<1, kBlockM / 8> others;
          pair.await(kWeightsReady);
          pair.take(shared.weights, others);
          of_scores.template to_gradients<kMasked>(scores, others, of_row);
          if constexpr (kBias) {
            if (arguments.column_sums != nullptr) sums.add_lines(scores);
          }
          of_scores.through_softcap(scores, others, [&] { pair.take(shared.derivative, others); });
          // dK += dS^T Q (BLOCK_N, HEAD_DIM_QK)
          multiply_add<kDtype>(acc, scores, q_rows[slot]);
        }
      };
      blocks.for_each(step_over);
      if constexpr (!kWeights && kBias) {
        if (arguments.column_sums != nullptr) {
          sums.store_lines(arguments.column_sums + (batch * problem.num_heads + head) * problem.seqlen_k + first_key,
                           block.keys - first_key);
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // every warp is past its products

    if constexpr (kWeights) {
      store_rows<kDtype>(acc, arguments.kept_scale, shared.sums.dvalue, warp_key, keys_left, block.keys_of(problem.dvalue),
                         problem.dvalue.row, static_cast<int>(problem.head_dim_v));
    } else {
      store_rows<kDtype>(acc, problem.softmax_scale, shared.sums.dkey, warp_key, keys_left, block.keys_of(problem.dkey), problem.dkey.row,
                         static_cast<int>(problem.head_dim_qk));
    }
  };
  if (pair.has_weights) {
    walk(std::true_type());
  } else {
    walk(std::false_type());
  }
}

}  // namespace fused_attention::cuda::sm80
