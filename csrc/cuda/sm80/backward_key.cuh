// SPDX-License-Identifier: Apache-2.0
// The gradients of key and value, for compute capability 8.0 and newer. A block owns BLOCK_N keys of one key head and visits all the rows
// that see them, one query head of the group after another; no atomics, so every run gives the same bits.
//
// Everything is transposed: S^T = K Q^T and dP^T = V dO^T (keys x rows) are already in registers as the left operands of dvalue = P^T dO
// and dkey = scale * dS^T Q. Where the accumulators of both do not fit, two launches compute one each.
#pragma once
#include "../gradients.cuh"
#include "../key_block.cuh"
#include "backward_tiles.cuh"

namespace fused_attention::cuda::sm80 {

// DKEY, DVALUE: which of the two are computed.
template <bool DKEY, bool DVALUE>
struct BackwardKey : BackwardTiles {
  static_assert(kBlockN == 16 * kWarps && kBlockN == kKeysPerTile);
  static_assert(kKeysPerTile % kBlockM == 0 && kBlockM % 32 == 0);
  static_assert(2 * kBlockM <= kThreads, "a thread copies one number of a row");

  struct SharedMemory {
    KeyTile k;    // at the end dkey
    ValueTile v;  // at the end dvalue
    QueryTile q[kStages];
    GradientTile dout[kStages];
    RowStatistics<kBlockM> statistics[kStages];
  };

  static FA_DEVICE void run(const BackwardArguments& arguments);
};

template <bool DKEY, bool DVALUE>
FA_DEVICE void BackwardKey<DKEY, DVALUE>::run(const BackwardArguments& arguments) {
  auto& shared = shared_memory<BackwardKey>();
  const AttentionProblem& problem = arguments.problem;
  const KeyBlock<kBlockN> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  const int batch = block.batch, start_n = block.start_n;
  if (start_n >= block.keys) return;
  const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16, first_key = start_n + warp_key;

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return key_mask.key_exists(start_n + row); };
  copy_rows_async<kThreads>(shared.k, block.keys_of(problem.key), problem.key.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                            exists);
  copy_rows_async<kThreads>(shared.v, block.keys_of(problem.value), problem.value.row, static_cast<int>(problem.head_dim_v), threadIdx.x,
                            exists);
  ptx::cp_async_commit();

  const bool all_exist = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const SeeingRows<kBlockN> rows(sequence, start_n, all_exist);

  const auto k_lane = shared.k.by_rows(warp_key);
  const auto v_lane = shared.v.by_rows(warp_key);
  const auto q_columns = shared.q[0].by_columns();
  const auto q_rows = shared.q[0].by_rows();
  const auto do_columns = shared.dout[0].by_columns();
  const auto do_rows = shared.dout[0].by_rows();
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;
  Accumulators<1, DKEY ? kHeadDimQk / 8 : 2> dkey = {};
  Accumulators<1, DVALUE ? kHeadDimV / 8 : 2> dvalue = {};

#pragma unroll 1
  for (int head = block.key_head * arguments.heads_per_group; head < (block.key_head + 1) * arguments.heads_per_group; ++head) {
    const VisitedBlocks<kBlockM, !kPlain> blocks(rows.of_first, rows.of_last, rows.no_keys, arguments.column_tiles, batch, head,
                                                 start_n / kBlockN);
    const ScoreMask mask{sequence, problem, batch, head};
    const uint16_t* const query = head_of(problem.query, batch, head) + sequence.first_row * problem.query.row;  // (Lq, Dqk)
    const uint16_t* const dout = head_of(problem.dout, batch, head) + sequence.first_row * problem.dout.row;     // (Lq, Dv)
    const int64_t place = statistics_of(problem, sequence, batch, head);
    const float *const row_lse = arguments.row_lse + place, *const row_delta = arguments.row_delta + place;  // (Lq,)
    ScoreGradientSums sums;

    // Loads: every call is one group of cp.async, an empty one past the last block.
    const auto load = [&](int step) {
      if (step < blocks.num_blocks) {
        const int start_m = blocks.start(step), slot = step % kStages, rows_left = sequence.rows_present - start_m;
        const bool all_attend = !kBias && step < blocks.num_full;  // rows that attend to nothing may have any gradient
        copy_rows_async<kThreads>(shared.q[slot], query + start_m * problem.query.row, problem.query.row,
                                  static_cast<int>(problem.head_dim_qk), threadIdx.x, [&](int row) { return row < rows_left; });
        copy_rows_async<kThreads>(shared.dout[slot], dout + start_m * problem.dout.row, problem.dout.row,
                                  static_cast<int>(problem.head_dim_v), threadIdx.x,
                                  [&](int row) { return row < rows_left && (all_attend || row_lse[start_m + row] != kInfinity); });
        copy_statistics_async(shared.statistics[slot], row_lse + start_m, row_delta + start_m, rows_left, threadIdx.x);
      }
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) load(stage);

    const auto step_over = [&](int step, auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      const int start_m = blocks.start(step), slot = step % kStages;
      ptx::cp_async_wait<kStages - 1>();  // this block has landed
      __syncthreads();
      const RowStatistics<kBlockM>& statistics = shared.statistics[slot];
      const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };

      // S^T = K Q^T and dP^T = V dO^T (BLOCK_N, BLOCK_M), each warp its own keys.
      Accumulators<1, kBlockM / 8> scores;
      [[maybe_unused]] Accumulators<1, kBlockM / 8> gradients, softcap_derivative;
      multiply_transposed<kDtype>(scores, k_lane, q_columns[slot]);
      if constexpr (DKEY) multiply_transposed<kDtype>(gradients, v_lane, do_columns[slot]);

      // P^T and dS^T
      const ScoreGradientStep<kClass, true> of_scores{arguments, mask, first_key, start_m, drops, lane};
      const float scale = of_scores.transform(scores, softcap_derivative);
      if constexpr (kMasked) of_scores.mask(scores);
      of_scores.to_weights(scores, scale, [&](int, int n, int e) { return statistics.lse[column(n, e)]; });
      if constexpr (DKEY) {
        of_scores.template to_gradients<kMasked>(gradients, scores, [&](int, int n, int e) { return statistics.delta[column(n, e)]; });
        if constexpr (kBias) {
          if (arguments.column_sums != nullptr) sums.add_lines(gradients);
        }
        of_scores.through_softcap(gradients, softcap_derivative);
      } else if (drops) {
        drop_marked(scores);
      }

      // dV += P^T dO (BLOCK_N, HEAD_DIM_V) and dK += dS^T Q (BLOCK_N, HEAD_DIM_QK)
      if constexpr (DVALUE) multiply_add<kDtype>(dvalue, scores, do_rows[slot]);
      if constexpr (DKEY) multiply_add<kDtype>(dkey, gradients, q_rows[slot]);
      __syncthreads();  // every warp is past its products with this block
      load(step + kStages);
    };
    blocks.for_each(step_over);
    if constexpr (DKEY && kBias) {
      if (arguments.column_sums != nullptr) {
        sums.store_lines(arguments.column_sums + (batch * problem.num_heads + head) * problem.seqlen_k + first_key, block.keys - first_key);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // K and V have landed and were read

  const int keys_left = block.keys - start_n;
  if constexpr (DKEY) {
    store_rows<kDtype>(dkey, problem.softmax_scale, shared.k, warp_key, keys_left, block.keys_of(problem.dkey), problem.dkey.row,
                       static_cast<int>(problem.head_dim_qk));
  }
  if constexpr (DVALUE) {
    store_rows<kDtype>(dvalue, arguments.kept_scale, shared.v, warp_key, keys_left, block.keys_of(problem.dvalue), problem.dvalue.row,
                       static_cast<int>(problem.head_dim_v));
  }
}

}  // namespace fused_attention::cuda::sm80
