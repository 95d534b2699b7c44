// SPDX-License-Identifier: Apache-2.0
// backward_key.cuh for head dims above 128: a block computes dkey and dvalue of 64 keys of one key head, two warps to 16 keys
// (warp_pairs.cuh).
//
//   the weights' warp:    S^T = K Q^T     -> P^T                   dvalue += P^T dO
//   the gradients' warp:  dP^T = V dO^T   wait for P^T -> dS^T     dkey   += dS^T Q
//
// Four products, none of them twice. K and V stay in registers where both fit beside the sums.
#pragma once
#include "../gradients.cuh"
#include "../row_block.cuh"
#include "warp_pairs.cuh"

namespace fused_attention::cuda::sm80 {

// HELD_QK, HELD_V: how many columns of K and V a warp has in registers.
template <Dtype DTYPE, int HEAD_DIM_QK, int HEAD_DIM_V, FeatureClass CLASS, bool DROPOUT, int BLOCK_M, int BLOCK_N, int NUM_WARPS,
          int STAGES, int HELD_QK, int HELD_V>
struct BackwardKeyPairsConfig {
  static constexpr Dtype kDtype = DTYPE;
  static constexpr FeatureClass kClass = CLASS;
  static constexpr bool kDropout = DROPOUT;
  static constexpr int kHeadDimQk = HEAD_DIM_QK, kHeadDimV = HEAD_DIM_V, kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = STAGES;
  static_assert(32 * NUM_WARPS == kPairedThreads && BLOCK_N == 16 * kPairs && BLOCK_N == kKeysPerTile);
  static_assert(kKeysPerTile % BLOCK_M == 0 && BLOCK_M % 16 == 0 && STAGES >= 2);

  using LeftKey = LeftOperand<BLOCK_N, HEAD_DIM_QK, HELD_QK>;
  using LeftValue = LeftOperand<BLOCK_N, HEAD_DIM_V, HELD_V>;
  using QueryTile = SharedTile<BLOCK_M, HEAD_DIM_QK>;
  using GradientTile = SharedTile<BLOCK_M, HEAD_DIM_V>;  // of dout
  using KeyTile = SharedTile<BLOCK_N, HEAD_DIM_QK>;      // of dkey, at the end
  using ValueTile = SharedTile<BLOCK_N, HEAD_DIM_V>;     // of dvalue
  // What is held of K and V is read before the first rows come to where it was.
  static constexpr int kRestBytes = LeftKey::kRestBytes + LeftValue::kRestBytes;
  static constexpr int kHeldBytes = LeftKey::HeldTile::kBytes + LeftValue::HeldTile::kBytes;
  static constexpr int kStageBytes = QueryTile::kBytes + GradientTile::kBytes;
  static constexpr int kTileBytes = kRestBytes + (kHeldBytes > STAGES * kStageBytes ? kHeldBytes : STAGES * kStageBytes);
  static constexpr int kScoreBytes = BLOCK_M * BLOCK_N * 4;  // float32, of weights, and of softcap's derivative in classes that have it
  static constexpr int kStatisticsBytes = 2 * BLOCK_M * 4;   // lse and delta
  static constexpr int kSharedBytes = kTileBytes + (CLASS == FeatureClass::plain ? 1 : 2) * kScoreBytes + STAGES * kStatisticsBytes;
  static_assert(KeyTile::kBytes + ValueTile::kBytes <= kTileBytes);
};

template <class Config>
FA_DEVICE void backward_key_pairs(const BackwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlocks = kBlockM / 8;
  constexpr bool kPlain = Config::kClass == FeatureClass::plain, kBias = Config::kClass == FeatureClass::bias;
  using LeftKey = typename Config::LeftKey;
  using LeftValue = typename Config::LeftValue;
  using QueryTile = typename Config::QueryTile;
  using GradientTile = typename Config::GradientTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t k_smem = ptx::shared_address(shared);                              // (BLOCK_N, HEAD_DIM_QK - HELD_QK)
  const uint32_t v_smem = k_smem + LeftKey::kRestBytes;                             // (BLOCK_N, HEAD_DIM_V - HELD_V)
  const uint32_t q_smem = v_smem + LeftValue::kRestBytes;                           // STAGES x (BLOCK_M, HEAD_DIM_QK)
  const uint32_t do_smem = q_smem + kStages * QueryTile::kBytes;                    // STAGES x (BLOCK_M, HEAD_DIM_V)
  const uint32_t held_smem = q_smem;                                                // (BLOCK_N, HELD_QK) and (BLOCK_N, HELD_V), before
  float* const statistics = reinterpret_cast<float*>(shared + Config::kTileBytes);  // STAGES x (2, BLOCK_M)
  unsigned char* const weights_smem = shared + Config::kTileBytes + kStages * Config::kStatisticsBytes;
  unsigned char* const derivative_smem = weights_smem + Config::kScoreBytes;

  const AttentionProblem& problem = arguments.problem;
  const auto block_columns = static_cast<uint32_t>((problem.seqlen_k + kBlockN - 1) / kBlockN);
  const auto num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv);
  const uint32_t line = blockIdx.x / block_columns;
  const int start_n = static_cast<int>(blockIdx.x % block_columns) * kBlockN, key_head = static_cast<int>(line % num_heads_kv);
  const int batch = static_cast<int>(line / num_heads_kv);
  Sequence sequence(problem, batch);
  sequence.window_right = min(sequence.window_right, kUnlimited);  // no other number, but ptxas spills where it is read from the arguments
  const int keys = problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present;  // in memory
  if (start_n >= keys) return;
  const WarpPair pair;
  const int warp_key = 16 * pair.number, first_key = start_n + warp_key;
  const auto rows_of_keys = [&](const StridedTensor& tensor) {
    return head_of(tensor, batch, key_head) + (sequence.first_key + start_n) * tensor.row;
  };

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return key_mask.key_exists(start_n + row); };
  // By position: rows that see the first and the last key. With a key that does not exist no block of rows counts as full.
  const bool has_all_keys = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const int last_key = min(start_n + kBlockN, sequence.keys_present) - 1, keys_left = keys - start_n;
  KeyRange of_first = sequence.rows_of(start_n), of_last = sequence.rows_of(last_key);
  if (!has_all_keys) of_first.to = 0;
  if (last_key < start_n || sequence.rows_present == 0) of_first = of_last = {0, 0};
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;

  // What one of a pair's warps does.
  const auto walk = [&](auto of_weights) {
    constexpr bool kWeights = decltype(of_weights)::value;
    using Left = std::conditional_t<kWeights, LeftKey, LeftValue>;
    using RowTile = std::conditional_t<kWeights, QueryTile, GradientTile>;
    const StridedTensor &keys_of = kWeights ? problem.key : problem.value, &rows_of = kWeights ? problem.query : problem.dout;
    const int left_columns = static_cast<int>(kWeights ? problem.head_dim_qk : problem.head_dim_v);
    const uint32_t own_held_smem = held_smem + (kWeights ? 0 : LeftKey::HeldTile::kBytes), own_rest_smem = kWeights ? k_smem : v_smem;
    Left::copy(own_held_smem, own_rest_smem, rows_of_keys(keys_of), keys_of.row, left_columns, threadIdx.x % (kPairedThreads / 2), exists);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    Left left;
    left.hold(own_held_smem, own_rest_smem, warp_key);
    const auto q_columns = LaneAddress<QueryTile>::by_columns(q_smem);
    const auto q_rows = LaneAddress<QueryTile>::by_rows(q_smem);
    const auto do_columns = LaneAddress<GradientTile>::by_columns(do_smem);
    const auto do_rows = LaneAddress<GradientTile>::by_rows(do_smem);
    Accumulators<1, (kWeights ? Config::kHeadDimV : Config::kHeadDimQk) / 8> acc = {};

#pragma unroll 1
    for (int head = key_head * arguments.heads_per_group; head < (key_head + 1) * arguments.heads_per_group; ++head) {
      const VisitedBlocks<kBlockM, !kPlain> blocks(of_first, of_last, last_key < start_n, arguments.column_tiles, batch, head,
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
          copy_rows_async<RowTile, kPairedThreads / 2>(
              (kWeights ? q_smem : do_smem) + slot * RowTile::kBytes, source + start_m * rows_of.row, rows_of.row, left_columns, thread,
              [&](int row) { return row < rows_left && (all_attend || row_lse[start_m + row] != kInfinity); });
          const int row = static_cast<int>(thread);
          if (row < kBlockM) {
            float* const target = statistics + (2 * slot + (kWeights ? 0 : 1)) * kBlockM + row;
            if (row < rows_left) {
              ptx::cp_async_4(ptx::shared_address(target), row_statistic + start_m + row);
            } else {  // weights of rows that are not there are 0
              *target = kWeights ? kInfinity : 0.0f;
            }
          }
        }
        ptx::cp_async_commit();
      };
      __syncthreads();  // every warp has its left operand, and is past the head before
#pragma unroll
      for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

      const auto step_over = [&](int step, auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        const int start_m = blocks.start(step), slot = step % kStages;
        ptx::cp_async_wait<kStages - 2>();  // this block has landed
        __syncthreads();                    // and every warp is past the one before
        load(step + kStages - 1);
        const float* const statistic = statistics + (2 * slot + (kWeights ? 0 : 1)) * kBlockM;
        const auto of_row = [&](int, int n, int e) { return statistic[8 * n + 2 * (pair.lane % 4) + e % 2]; };

        // S^T = K Q^T or dP^T = V dO^T (BLOCK_N, BLOCK_M), each pair its own keys.
        Accumulators<1, kBlocks> scores;
        const ScoreGradientStep<Config::kClass, true> of_scores{arguments, mask, first_key, start_m, drops, pair.lane};
        if constexpr (kWeights) {
          multiply_transposed<kDtype, Config::kHeadDimQk / 16>(scores, left,
                                                               LaneAddress<QueryTile>{q_columns.first + slot * QueryTile::kBytes});
          Accumulators<1, kBlocks> softcap_derivative;
          const float scale = of_scores.transform(scores, softcap_derivative, [&] { pair.put(derivative_smem, softcap_derivative); });
          if constexpr (kMasked) of_scores.mask(scores);
          of_scores.to_weights(scores, scale, of_row);
          pair.put(weights_smem, scores);
          pair.announce(kWeightsReady);
          if (drops) drop_marked(scores);
          // dV += P^T dO (BLOCK_N, HEAD_DIM_V)
          multiply_add<kDtype>(acc, scores, LaneAddress<GradientTile>{do_rows.first + slot * GradientTile::kBytes});
        } else {
          multiply_transposed<kDtype, Config::kHeadDimV / 16>(scores, left,
                                                              LaneAddress<GradientTile>{do_columns.first + slot * GradientTile::kBytes});
          Accumulators<1, kBlocks> others;
          pair.await(kWeightsReady);
          pair.take(weights_smem, others);
          of_scores.template to_gradients<kMasked>(scores, others, of_row);
          if constexpr (kBias) {
            if (arguments.column_sums != nullptr) sums.add_lines(scores);
          }
          of_scores.through_softcap(scores, others, [&] { pair.take(derivative_smem, others); });
          // dK += dS^T Q (BLOCK_N, HEAD_DIM_QK)
          multiply_add<kDtype>(acc, scores, LaneAddress<QueryTile>{q_rows.first + slot * QueryTile::kBytes});
        }
      };
      int step = 0;
#pragma unroll 1
      for (; step < blocks.num_full; ++step) step_over(step, std::false_type());
#pragma unroll 1
      for (; step < blocks.num_blocks; ++step) step_over(step, std::true_type());
      if constexpr (!kWeights && kBias) {
        if (arguments.column_sums != nullptr) {
          sums.store_lines(arguments.column_sums + (batch * problem.num_heads + head) * problem.seqlen_k + first_key, keys - first_key);
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // every warp is past its products

    if constexpr (kWeights) {
      store_rows<kDtype, typename Config::ValueTile>(acc, arguments.kept_scale, shared + Config::KeyTile::kBytes, warp_key, keys_left,
                                                     rows_of_keys(problem.dvalue), problem.dvalue.row,
                                                     static_cast<int>(problem.head_dim_v));
    } else {
      store_rows<kDtype, typename Config::KeyTile>(acc, problem.softmax_scale, shared, warp_key, keys_left, rows_of_keys(problem.dkey),
                                                   problem.dkey.row, static_cast<int>(problem.head_dim_qk));
    }
  };
  if (pair.has_weights) {
    walk(std::true_type());
  } else {
    walk(std::false_type());
  }
}

}  // namespace fused_attention::cuda::sm80
