// SPDX-License-Identifier: Apache-2.0
// All three gradients in one pass, for compute capability 8.0 and newer: a block computes BLOCK_N keys of one key head from the rows that
// see them, of the query heads that share the keys one after the other, and scores are computed once.
//
//   S^T = K Q^T, dP^T = V dO^T       (keys x rows), a warp 16 keys; as they lie in registers they are the left operands of
//   dvalue += P^T dO, dkey += dS^T Q
//   dS -> shared memory; dS K        (rows x Dqk), shared out among all warps, is added to float32 sums of dquery in global memory
//
// backward_delta.cuh runs before and clears the sums, backward_dquery.cuh runs after and makes dquery of them. Blocks add in any order, or
// in a fixed one: with `turns` a block takes a ticket, which says which keys are its own, and adds to a tile of rows when all blocks with
// smaller tickets that visit the tile have. It waits for smaller tickets alone, whose blocks have started: that ends, however few blocks a
// GPU runs at a time. docs/cuda-kernels.md has the order.
#pragma once
#include "../gradients.cuh"
#include "../row_block.cuh"
#include "query_sums.cuh"
#include "row_visits.cuh"

namespace fused_attention::cuda::sm80 {

template <Dtype DTYPE, int HEAD_DIM_QK, int HEAD_DIM_V, FeatureClass CLASS, bool DROPOUT, int BLOCK_M, int BLOCK_N, int NUM_WARPS,
          int STAGES>
struct BackwardConfig {
  static constexpr Dtype kDtype = DTYPE;
  static constexpr FeatureClass kClass = CLASS;
  static constexpr bool kDropout = DROPOUT;
  static constexpr int kHeadDimQk = HEAD_DIM_QK, kHeadDimV = HEAD_DIM_V, kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = STAGES;
  static constexpr int kThreads = 32 * NUM_WARPS;
  static_assert(BLOCK_N == 16 * NUM_WARPS && BLOCK_M % 32 == 0);
  static_assert(CLASS == FeatureClass::plain || BLOCK_N == kKeysPerTile, "lists name tiles of so many keys");
  static_assert(2 * BLOCK_M <= kThreads, "a thread copies one number of a row");

  using KeyTile = SharedTile<BLOCK_N, HEAD_DIM_QK>;
  using ValueTile = SharedTile<BLOCK_N, HEAD_DIM_V>;
  using QueryTile = SharedTile<BLOCK_M, HEAD_DIM_QK>;
  using GradientTile = SharedTile<BLOCK_M, HEAD_DIM_V>;  // of dout
  using ScoreTile = SharedTile<BLOCK_N, BLOCK_M>;        // of the gradients of scores, transposed
  using Part = QueryPart<BLOCK_M, HEAD_DIM_QK, NUM_WARPS>;
  static constexpr int kStatisticsBytes = 2 * BLOCK_M * 4;  // lse and delta
  static constexpr int kSharedBytes =
      KeyTile::kBytes + ValueTile::kBytes + ScoreTile::kBytes + STAGES * (QueryTile::kBytes + GradientTile::kBytes + kStatisticsBytes);
};

template <class Config>
FA_DEVICE void backward(const OnePassArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlocks = kBlockM / 8;
  constexpr bool kPlain = Config::kClass == FeatureClass::plain;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using QueryTile = typename Config::QueryTile;
  using GradientTile = typename Config::GradientTile;
  using ScoreTile = typename Config::ScoreTile;
  using Part = typename Config::Part;
  using Visits = RowVisits<kBlockM, !kPlain>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t k_smem = ptx::shared_address(shared);                   // (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = k_smem + KeyTile::kBytes;                      // (BLOCK_N, HEAD_DIM_V)
  const uint32_t ds_smem = v_smem + ValueTile::kBytes;                   // (BLOCK_N, BLOCK_M)
  const uint32_t q_smem = ds_smem + ScoreTile::kBytes;                   // STAGES x (BLOCK_M, HEAD_DIM_QK)
  const uint32_t do_smem = q_smem + kStages * QueryTile::kBytes;         // STAGES x (BLOCK_M, HEAD_DIM_V)
  const uint32_t statistics = do_smem + kStages * GradientTile::kBytes;  // STAGES x (2, BLOCK_M) float32
  const auto statistics_of_stage = [&](int slot) {
    return reinterpret_cast<float*>(shared + (statistics - k_smem) + slot * Config::kStatisticsBytes);
  };

  // Which keys: the last ones first where they are seen by the fewest rows, so that blocks that add first have the least to do before it.
  const AttentionProblem& problem = arguments.problem;
  if constexpr (kPlain) {  // what plan.cpp knows: it makes some registers free
    __builtin_assume(problem.cu_seqlens_q == nullptr && problem.cu_seqlens_k == nullptr);
    __builtin_assume(problem.key_lengths == nullptr && problem.query_lengths == nullptr && problem.key_mask == nullptr);
  }
  const bool in_order = arguments.turns != nullptr;
  uint32_t number = blockIdx.x;
  if (in_order) {
    auto* const ticket = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x == 0) *ticket = ptx::atomic_add(arguments.turns, 1);
    __syncthreads();
    number = *ticket;
    __syncthreads();
  }
  const auto block_columns = static_cast<uint32_t>((problem.seqlen_k + kBlockN - 1) / kBlockN);
  const auto num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv);
  const bool descending = problem.causal != Causal::none || problem.window_right < kUnlimited;
  const bool sees_all = !descending && problem.window_left >= kUnlimited;
  const uint32_t line = number / block_columns, place = number % block_columns;
  const int block_n = static_cast<int>(descending ? block_columns - 1 - place : place), start_n = block_n * kBlockN;
  const int key_head = static_cast<int>(line % num_heads_kv), batch = static_cast<int>(line / num_heads_kv);
  const Sequence sequence(problem, batch);
  const int keys = problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present;  // in memory
  if (start_n >= keys) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_key = 16 * warp, first_key = start_n + warp_key;
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

  // By position: rows that see the first and the last key. With a key that does not exist no tile of rows counts as full.
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
  const Part part(warp);
  const auto ds_lane = LaneAddress<ScoreTile>::by_columns(ds_smem, part.first_row() / 16);
  const auto k_rows = LaneAddress<KeyTile>::by_rows(k_smem, 0, part.column_group);
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;
  Accumulators<1, Config::kHeadDimQk / 8> dkey = {};
  Accumulators<1, Config::kHeadDimV / 8> dvalue = {};

#pragma unroll 1
  for (int head = key_head * arguments.heads_per_group; head < (key_head + 1) * arguments.heads_per_group; ++head) {
    const float share = sees_all ? static_cast<float>(block_n) / static_cast<float>(block_columns) : 0.0f;
    const Visits visits(of_first, of_last, arguments.column_tiles, batch, head, start_n / kKeysPerTile, share);
    const ScoreMask mask{sequence, problem, batch, head};
    const uint16_t* const query = head_of(problem.query, batch, head) + sequence.first_row * problem.query.row;  // (Lq, Dqk)
    const uint16_t* const dout = head_of(problem.dout, batch, head) + sequence.first_row * problem.dout.row;     // (Lq, Dv)
    const int64_t first_statistic = statistics_of(problem, sequence, batch, head);
    const float *const row_lse = arguments.row_lse + first_statistic, *const row_delta = arguments.row_delta + first_statistic;  // (Lq,)

    // Loads: every call is one group of cp.async, an empty one past the last visit.
    typename Visits::Cursor loaded, computed;
    const auto load = [&] {
      if (loaded.visits < visits.num) {
        const int slot = loaded.visits % kStages;
        const Visit visit = visits.next(loaded);
        const int start_m = visit.start_m, rows_left = sequence.rows_present - start_m;
        copy_rows_async<QueryTile, Config::kThreads>(q_smem + slot * QueryTile::kBytes, query + start_m * problem.query.row,
                                                     problem.query.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                                                     [&](int row) { return row < rows_left; });
        // Rows that attend to nothing may have any gradient.
        copy_rows_async<GradientTile, Config::kThreads>(do_smem + slot * GradientTile::kBytes, dout + start_m * problem.dout.row,
                                                        problem.dout.row, static_cast<int>(problem.head_dim_v), threadIdx.x, [&](int row) {
                                                          return row < rows_left && (visit.is_full || row_lse[start_m + row] != kInfinity);
                                                        });
        const int row = static_cast<int>(threadIdx.x) % kBlockM, which = static_cast<int>(threadIdx.x) / kBlockM;
        if (which < 2) {
          const int offset = which * kBlockM + row;
          if (row < rows_left) {
            ptx::cp_async_4(statistics + slot * Config::kStatisticsBytes + 4 * offset, (which == 0 ? row_lse : row_delta) + start_m + row);
          } else {  // weights of rows that are not there are 0
            statistics_of_stage(slot)[offset] = which == 0 ? kInfinity : 0.0f;
          }
        }
      }
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) load();

#pragma unroll 1
    for (int step = 0; step < visits.num; ++step) {
      const int slot = step % kStages;
      const Visit visit = visits.next(computed);
      const int start_m = visit.start_m;
      ptx::cp_async_wait<kStages - 1>();  // this tile has landed
      __syncthreads();
      const float *const lse = statistics_of_stage(slot), *const delta = lse + kBlockM;
      const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };

      // S^T = K Q^T and dP^T = V dO^T (BLOCK_N, BLOCK_M), each warp its own keys.
      Accumulators<1, kBlocks> scores, gradients;
      multiply_transposed<kDtype, Config::kHeadDimQk / 16>(
          scores, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, k_lane.at(0, i)); },
          LaneAddress<QueryTile>{q_columns.first + slot * QueryTile::kBytes});
      multiply_transposed<kDtype, Config::kHeadDimV / 16>(
          gradients, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, v_lane.at(0, i)); },
          LaneAddress<GradientTile>{do_columns.first + slot * GradientTile::kBytes});

      // P^T and dS^T
      const auto differentiate = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        [[maybe_unused]] Accumulators<1, kBlocks> slopes;
        float scale = arguments.score_scale;
        if constexpr (!kPlain) {
          const ScoreTransform transform(arguments, batch, head);
          scale = cap_with_slopes(transform, scores, slopes);
          scale = transform.add_slopes(scores, scale, -sequence.offset, first_key, start_m);
        }
        if constexpr (kMasked) mask_transposed<kPlain>(mask, scores, first_key, start_m);
        scores_to_weights<false>(scores, scale, [&](int, int n, int e) { return lse[column(n, e)]; });
        if (drops) Dropout(problem, batch, head).mark_transposed(scores, first_key, start_m);
        weights_to_score_gradients<kMasked>(gradients, scores, drops, arguments.kept_scale,
                                            [&](int, int n, int e) { return delta[column(n, e)]; });
        if constexpr (!kPlain) {
          if (arguments.softcap_log2 != 0.0f) {
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) gradients[0][n][e] *= slopes[0][n][e];
            }
          }
        }
      };
      if (visit.is_full) {
        differentiate(std::false_type());
      } else {
        differentiate(std::true_type());
      }
      PackedWeights<kBlocks> weights, dscores;
      pack_weights<kDtype>(weights, scores);
      pack_weights<kDtype>(dscores, gradients);
      unsigned char* const ds_tile = shared + (ds_smem - k_smem);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(ds_tile + ScoreTile::offset(warp_key + 8 * half + lane / 4, n) + 4 * (lane % 4)) = dscores[n][half];
        }
      }

      // dV += P^T dO (BLOCK_N, HEAD_DIM_V)
      multiply_add_packed<kDtype>(dvalue, weights, LaneAddress<GradientTile>{do_rows.first + slot * GradientTile::kBytes});
      uint32_t* turn = nullptr;
      if (in_order) {
        const int64_t row_tiles = (problem.seqlen_q + kBlockM - 1) / kBlockM;
        turn = arguments.turns + 1 + (batch * problem.num_heads + head) * row_tiles + start_m / kBlockM;
        if (warp == 0) {
          const int before = turn_at<kBlockM, kBlockN>(sequence, arguments.tiles, batch, head, start_m, block_n, descending);
          while (lane == 0 && ptx::load_acquire(turn) != static_cast<uint32_t>(before)) continue;
        }
      }
      __syncthreads();  // all of dS is there

      // dK += dS^T Q (BLOCK_N, HEAD_DIM_QK), dQ += dS K (BLOCK_M, HEAD_DIM_QK)
      multiply_add_packed<kDtype>(dkey, dscores, LaneAddress<QueryTile>{q_rows.first + slot * QueryTile::kBytes});
      Accumulators<Part::kMatrices, Part::kBlocks> dquery;
      multiply_scores_keys<kDtype, Part>(dquery, ds_lane, k_rows);
      const int columns = static_cast<int>(problem.head_dim_qk);
      add_to_sums(dquery, part, arguments.dquery_sums + (first_statistic + start_m) * columns, sequence.rows_present - start_m, columns);
      __syncthreads();  // every warp is past its products with this tile, and has added
      if (in_order && threadIdx.x == 0) ptx::red_increment_release(turn);
      load();
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // K and V have landed and were read

  const int keys_left = keys - start_n;
  store_rows<kDtype, KeyTile>(dkey, problem.softmax_scale, shared, warp_key, keys_left, rows_of_keys(problem.dkey), problem.dkey.row,
                              static_cast<int>(problem.head_dim_qk));
  store_rows<kDtype, ValueTile>(dvalue, arguments.kept_scale, shared + KeyTile::kBytes, warp_key, keys_left, rows_of_keys(problem.dvalue),
                                problem.dvalue.row, static_cast<int>(problem.head_dim_v));
}

}  // namespace fused_attention::cuda::sm80
