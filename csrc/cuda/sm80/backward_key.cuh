// SPDX-License-Identifier: Apache-2.0
// The gradients of key and value, for compute capability 8.0 and newer: a block computes BLOCK_N keys of one key head from all the rows
// that see them, of the query heads that share the keys one after the other; no atomics, so the same bits in every run.
//
// Everything is transposed: S^T = K Q^T and dP^T = V dO^T (keys x rows) are, in the registers where they were computed, the left operands
// of dvalue = P^T dO and dkey = scale * dS^T Q. Above head_dim 128 the accumulators of both do not fit: two launches compute one each.
#pragma once
#include "../gradients.cuh"
#include "../row_block.cuh"

namespace fused_attention::cuda::sm80 {

template <Dtype DTYPE, int HEAD_DIM_QK, int HEAD_DIM_V, FeatureClass CLASS, bool DROPOUT, int BLOCK_M, int BLOCK_N, int NUM_WARPS,
          int STAGES, bool DKEY, bool DVALUE>
struct BackwardKeyConfig {
  static constexpr Dtype kDtype = DTYPE;
  static constexpr FeatureClass kClass = CLASS;
  static constexpr bool kDropout = DROPOUT, kDkey = DKEY, kDvalue = DVALUE;
  static constexpr int kHeadDimQk = HEAD_DIM_QK, kHeadDimV = HEAD_DIM_V, kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = STAGES;
  static constexpr int kThreads = 32 * NUM_WARPS;
  static_assert(BLOCK_N == 16 * NUM_WARPS && BLOCK_N == kKeysPerTile && kKeysPerTile % BLOCK_M == 0 && BLOCK_M % 32 == 0);
  static_assert(2 * BLOCK_M <= kThreads, "a thread copies one number of a row");

  using KeyTile = SharedTile<BLOCK_N, HEAD_DIM_QK>;
  using ValueTile = SharedTile<BLOCK_N, HEAD_DIM_V>;
  using QueryTile = SharedTile<BLOCK_M, HEAD_DIM_QK>;
  using GradientTile = SharedTile<BLOCK_M, HEAD_DIM_V>;     // of dout
  static constexpr int kStatisticsBytes = 2 * BLOCK_M * 4;  // lse and delta
  static constexpr int kSharedBytes =
      KeyTile::kBytes + ValueTile::kBytes + STAGES * (QueryTile::kBytes + GradientTile::kBytes + kStatisticsBytes);
};

template <class Config>
FA_DEVICE void backward_key(const BackwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlocks = kBlockM / 8;
  constexpr bool kPlain = Config::kClass == FeatureClass::plain, kBias = Config::kClass == FeatureClass::bias;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using QueryTile = typename Config::QueryTile;
  using GradientTile = typename Config::GradientTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t k_smem = ptx::shared_address(shared);                   // (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = k_smem + KeyTile::kBytes;                      // (BLOCK_N, HEAD_DIM_V)
  const uint32_t q_smem = v_smem + ValueTile::kBytes;                    // STAGES x (BLOCK_M, HEAD_DIM_QK)
  const uint32_t do_smem = q_smem + kStages * QueryTile::kBytes;         // STAGES x (BLOCK_M, HEAD_DIM_V)
  const uint32_t statistics = do_smem + kStages * GradientTile::kBytes;  // STAGES x (2, BLOCK_M) float32
  const auto statistics_of_stage = [&](int slot) {
    return reinterpret_cast<const float*>(shared + (statistics - k_smem) + slot * Config::kStatisticsBytes);
  };

  const AttentionProblem& problem = arguments.problem;
  const auto block_columns = static_cast<uint32_t>((problem.seqlen_k + kBlockN - 1) / kBlockN);
  const auto num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv);
  const uint32_t line = blockIdx.x / block_columns;
  const int start_n = static_cast<int>(blockIdx.x % block_columns) * kBlockN, key_head = static_cast<int>(line % num_heads_kv);
  const int batch = static_cast<int>(line / num_heads_kv);
  const Sequence sequence(problem, batch);
  const int keys = problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present;  // in memory
  if (start_n >= keys) return;
  const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16, first_key = start_n + warp_key;
  const auto rows_of_keys = [&](const StridedTensor& tensor) {
    return head_of(tensor, batch, key_head) + (sequence.first_key + start_n) * tensor.row;
  };

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return key_mask.key_exists(start_n + row); };
  copy_rows_async<KeyTile, Config::kThreads>(k_smem, rows_of_keys(problem.key), problem.key.row, static_cast<int>(problem.head_dim_qk),
                                             threadIdx.x, exists);
  copy_rows_async<ValueTile, Config::kThreads>(v_smem, rows_of_keys(problem.value), problem.value.row, static_cast<int>(problem.head_dim_v),
                                               threadIdx.x, exists);
  ptx::cp_async_commit();

  // By position: rows that see the first and the last key. With a key that does not exist no block of rows counts as full.
  const bool has_all_keys = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const int last_key = min(start_n + kBlockN, sequence.keys_present) - 1;
  KeyRange of_first = sequence.rows_of(start_n), of_last = sequence.rows_of(last_key);
  if (!has_all_keys) of_first.to = 0;
  if (last_key < start_n || sequence.rows_present == 0) of_first = of_last = {0, 0};

  const auto k_lane = LaneAddress<KeyTile>::by_rows(k_smem, warp_key);
  const auto v_lane = LaneAddress<ValueTile>::by_rows(v_smem, warp_key);
  const auto q_columns = LaneAddress<QueryTile>::by_columns(q_smem);
  const auto q_rows = LaneAddress<QueryTile>::by_rows(q_smem);
  const auto do_columns = LaneAddress<GradientTile>::by_columns(do_smem);
  const auto do_rows = LaneAddress<GradientTile>::by_rows(do_smem);
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;
  Accumulators<1, Config::kDkey ? Config::kHeadDimQk / 8 : 2> dkey = {};
  Accumulators<1, Config::kDvalue ? Config::kHeadDimV / 8 : 2> dvalue = {};

#pragma unroll 1
  for (int head = key_head * arguments.heads_per_group; head < (key_head + 1) * arguments.heads_per_group; ++head) {
    const VisitedBlocks<kBlockM, !kPlain> blocks(of_first, of_last, last_key < start_n, arguments.column_tiles, batch, head,
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
        copy_rows_async<QueryTile, Config::kThreads>(q_smem + slot * QueryTile::kBytes, query + start_m * problem.query.row,
                                                     problem.query.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                                                     [&](int row) { return row < rows_left; });
        copy_rows_async<GradientTile, Config::kThreads>(do_smem + slot * GradientTile::kBytes, dout + start_m * problem.dout.row,
                                                        problem.dout.row, static_cast<int>(problem.head_dim_v), threadIdx.x, [&](int row) {
                                                          return row < rows_left && (all_attend || row_lse[start_m + row] != kInfinity);
                                                        });
        const int row = static_cast<int>(threadIdx.x) % kBlockM, which = static_cast<int>(threadIdx.x) / kBlockM;
        if (which < 2) {
          const uint32_t offset = slot * Config::kStatisticsBytes + 4 * (which * kBlockM + row);
          if (row < rows_left) {
            ptx::cp_async_4(statistics + offset, (which == 0 ? row_lse : row_delta) + start_m + row);
          } else {  // weights of rows that are not there are 0
            *reinterpret_cast<float*>(shared + (statistics - k_smem) + offset) = which == 0 ? kInfinity : 0.0f;
          }
        }
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
      const float *const lse = statistics_of_stage(slot), *const delta = lse + kBlockM;
      const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };

      // S^T = K Q^T and dP^T = V dO^T (BLOCK_N, BLOCK_M), each warp its own keys.
      Accumulators<1, kBlocks> scores;
      [[maybe_unused]] Accumulators<1, kBlocks> gradients, softcap_derivative;
      multiply_transposed<kDtype, Config::kHeadDimQk / 16>(
          scores, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, k_lane.at(0, i)); },
          LaneAddress<QueryTile>{q_columns.first + slot * QueryTile::kBytes});
      if constexpr (Config::kDkey) {
        multiply_transposed<kDtype, Config::kHeadDimV / 16>(
            gradients, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, v_lane.at(0, i)); },
            LaneAddress<GradientTile>{do_columns.first + slot * GradientTile::kBytes});
      }

      // P^T and dS^T
      const ScoreGradientStep<Config::kClass, true> of_scores{arguments, mask, first_key, start_m, drops, lane};
      const float scale = of_scores.transform(scores, softcap_derivative);
      if constexpr (kMasked) of_scores.mask(scores);
      of_scores.to_weights(scores, scale, [&](int, int n, int e) { return lse[column(n, e)]; });
      if constexpr (Config::kDkey) {
        of_scores.template to_gradients<kMasked>(gradients, scores, [&](int, int n, int e) { return delta[column(n, e)]; });
        if constexpr (kBias) {
          if (arguments.column_sums != nullptr) sums.add_lines(gradients);
        }
        of_scores.through_softcap(gradients, softcap_derivative);
      } else if (drops) {
        drop_marked(scores);
      }

      // dV += P^T dO (BLOCK_N, HEAD_DIM_V) and dK += dS^T Q (BLOCK_N, HEAD_DIM_QK)
      if constexpr (Config::kDvalue)
        multiply_add<kDtype>(dvalue, scores, LaneAddress<GradientTile>{do_rows.first + slot * GradientTile::kBytes});
      if constexpr (Config::kDkey) multiply_add<kDtype>(dkey, gradients, LaneAddress<QueryTile>{q_rows.first + slot * QueryTile::kBytes});
      __syncthreads();  // every warp is past its products with this block
      load(step + kStages);
    };
    int step = 0;
#pragma unroll 1
    for (; step < blocks.num_full; ++step) step_over(step, std::false_type());
#pragma unroll 1
    for (; step < blocks.num_blocks; ++step) step_over(step, std::true_type());
    if constexpr (Config::kDkey && kBias) {
      if (arguments.column_sums != nullptr) {
        sums.store_lines(arguments.column_sums + (batch * problem.num_heads + head) * problem.seqlen_k + first_key, keys - first_key);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // K and V have landed and were read

  const int keys_left = keys - start_n;
  if constexpr (Config::kDkey) {
    store_rows<kDtype, KeyTile>(dkey, problem.softmax_scale, shared, warp_key, keys_left, rows_of_keys(problem.dkey), problem.dkey.row,
                                static_cast<int>(problem.head_dim_qk));
  }
  if constexpr (Config::kDvalue) {
    store_rows<kDtype, ValueTile>(dvalue, arguments.kept_scale, shared + KeyTile::kBytes, warp_key, keys_left, rows_of_keys(problem.dvalue),
                                  problem.dvalue.row, static_cast<int>(problem.head_dim_v));
  }
}

}  // namespace fused_attention::cuda::sm80
