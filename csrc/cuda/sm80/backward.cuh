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
#include "../key_block.cuh"
#include "backward_tiles.cuh"
#include "query_sums.cuh"
#include "row_visits.cuh"

namespace fused_attention::cuda::sm80 {

template <class Row>
struct BackwardConfig : BackwardTiles<Row> {
  static_assert(Row::kBlockN == 16 * Row::kWarps && Row::kBlockM % 32 == 0);
  static_assert(Row::kPlain || Row::kBlockN == kKeysPerTile, "lists name tiles of so many keys");
  static_assert(2 * Row::kBlockM <= Row::kThreads, "a thread copies one number of a row");

  using Tiles = BackwardTiles<Row>;
  using ScoreTile = SharedTile<Row::kBlockN, Row::kBlockM>;  // of the gradients of scores, transposed
  using Part = QueryPart<Row::kBlockM, Row::kHeadDimQk, Row::kWarps>;
  struct SharedMemory {
    typename Tiles::KeyTile::Memory k;    // at the end dkey
    typename Tiles::ValueTile::Memory v;  // at the end dvalue
    typename ScoreTile::Memory ds;
    typename Tiles::QueryTile::Memory q[Row::kStages];
    typename Tiles::GradientTile::Memory dout[Row::kStages];
    RowStatistics<Row::kBlockM> statistics[Row::kStages];
  };
};

// The next number of a counter, for a whole block. shared: room for it.
FA_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t* shared) {
  if (threadIdx.x == 0) *shared = ptx::atomic_add(counter, 1);
  __syncthreads();
  const uint32_t ticket = *shared;
  __syncthreads();
  return ticket;
}

template <class Config>
FA_DEVICE void backward(const OnePassArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kStages = Config::kStages, kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlocks = kBlockM / 8;
  constexpr bool kPlain = Config::kPlain;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using QueryTile = typename Config::QueryTile;
  using GradientTile = typename Config::GradientTile;
  using ScoreTile = typename Config::ScoreTile;
  using Part = typename Config::Part;
  using Visits = RowVisits<kBlockM, !kPlain>;
  using SharedMemory = typename Config::SharedMemory;
  auto& shared = shared_memory<Config>();
  const uint32_t smem = ptx::shared_address(&shared);
  const uint32_t k_smem = smem + offsetof(SharedMemory, k);      // (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = smem + offsetof(SharedMemory, v);      // (BLOCK_N, HEAD_DIM_V)
  const uint32_t ds_smem = smem + offsetof(SharedMemory, ds);    // (BLOCK_N, BLOCK_M)
  const uint32_t q_smem = smem + offsetof(SharedMemory, q);      // STAGES x (BLOCK_M, HEAD_DIM_QK)
  const uint32_t do_smem = smem + offsetof(SharedMemory, dout);  // STAGES x (BLOCK_M, HEAD_DIM_V)

  // Which keys: the last ones first where they are seen by the fewest rows, so that blocks that add first have the least to do before it.
  const AttentionProblem& problem = arguments.problem;
  const bool in_order = arguments.turns != nullptr;
  const uint32_t number = in_order ? take_ticket(arguments.turns, reinterpret_cast<uint32_t*>(&shared)) : blockIdx.x;
  // Where every row sees every key, by position, and additions need no order, blocks spread over the rows.
  const bool spreads = !in_order && problem.window_left >= kUnlimited && problem.window_right >= kUnlimited;
  const bool descending = problem.window_right < kUnlimited;
  const auto block_columns = static_cast<uint32_t>((problem.seqlen_k + kBlockN - 1) / kBlockN);
  const auto num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv);
  const uint32_t line = number / block_columns, place = number % block_columns;
  const int start_n = static_cast<int>(descending ? block_columns - 1 - place : place) * kBlockN;
  const int batch = static_cast<int>(line / num_heads_kv), key_head = static_cast<int>(line % num_heads_kv);
  const Sequence sequence = [&] {
    if constexpr (kPlain) {
      return Sequence(problem);
    } else {
      return Sequence(problem, batch);
    }
  }();
  const int keys = kPlain || problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present;  // in memory
  if (start_n >= keys) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_key = 16 * warp, first_key = start_n + warp_key;
  const auto rows_of_keys = [&](const StridedTensor& tensor) {  // made anew, so that nothing waits in registers for the end
    return head_of(tensor, ptx::again(batch), ptx::again(key_head)) + (sequence.first_key + ptx::again(start_n)) * tensor.row;
  };

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return kPlain ? start_n + row < sequence.keys_present : key_mask.key_exists(start_n + row); };
  copy_rows_async<KeyTile, Config::kThreads>(k_smem, rows_of_keys(problem.key), problem.key.row, static_cast<int>(problem.head_dim_qk),
                                             threadIdx.x, exists);
  copy_rows_async<ValueTile, Config::kThreads>(v_smem, rows_of_keys(problem.value), problem.value.row, static_cast<int>(problem.head_dim_v),
                                               threadIdx.x, exists);
  ptx::cp_async_commit();

  const bool has_all_keys = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;
  Accumulators<1, Config::kHeadDimQk / 8> dkey = {};
  Accumulators<1, Config::kHeadDimV / 8> dvalue = {};

  const auto visits_of = [&](int head) {
    const int start = static_cast<int>(ptx::again(start_n));
    const SeeingRows<kBlockN> rows(sequence, start, has_all_keys);
    const float before = static_cast<float>(start / kBlockN), blocks = static_cast<float>((problem.seqlen_k + kBlockN - 1) / kBlockN);
    return Visits(rows.of_first, rows.of_last, arguments.column_tiles, batch, head, start / kKeysPerTile, spreads ? before / blocks : 0.0f);
  };
  const Visits of_all_heads = visits_of(key_head);  // where there are no lists
#pragma unroll 1
  for (int group_head = 0; group_head < arguments.heads_per_group; ++group_head) {
    const int head = key_head * arguments.heads_per_group + group_head;
    const Visits visits = kPlain ? of_all_heads : visits_of(head);
    const ScoreMask mask{sequence, problem, batch, head};

    // Loads: every call is one group of cp.async, an empty one past the last visit.
    typename Visits::Cursor loaded, computed;
    const auto load = [&] {
      if (loaded.visits < visits.num) {
        const int slot = loaded.visits % kStages;
        const Visit visit = visits.next(loaded);
        const int start_m = visit.start_m, rows_left = sequence.rows_present - start_m;
        // Made anew, what follows from these takes no registers between loads.
        const int its_batch = ptx::again(batch), its_head = ptx::again(head);
        const uint32_t thread = ptx::again(threadIdx.x);
        const int64_t first_row = sequence.first_row + start_m, statistic = statistics_of(problem, sequence, its_batch, its_head) + start_m;
        const uint16_t* const query = head_of(problem.query, its_batch, its_head) + first_row * problem.query.row;  // (Lq - start_m, Dqk)
        const uint16_t* const dout = head_of(problem.dout, its_batch, its_head) + first_row * problem.dout.row;     // (Lq - start_m, Dv)
        const float *const row_lse = arguments.row_lse + statistic, *const row_delta = arguments.row_delta + statistic;
        copy_rows_async<QueryTile, Config::kThreads>(q_smem + slot * QueryTile::kBytes, query, problem.query.row,
                                                     static_cast<int>(problem.head_dim_qk), thread,
                                                     [&](int row) { return row < rows_left; });
        // Rows that attend to nothing may have any gradient.
        copy_rows_async<GradientTile, Config::kThreads>(
            do_smem + slot * GradientTile::kBytes, dout, problem.dout.row, static_cast<int>(problem.head_dim_v), thread,
            [&](int row) { return row < rows_left && (visit.is_full || row_lse[row] != kInfinity); });
        copy_statistics_async(shared.statistics[slot], row_lse, row_delta, rows_left, thread);
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
      const RowStatistics<kBlockM>& statistics = shared.statistics[slot];
      const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };

      // S^T = K Q^T and dP^T = V dO^T (BLOCK_N, BLOCK_M), each warp its own keys.
      // Addresses made anew at each step: what follows from them takes no registers between steps.
      const uint32_t thread = ptx::again(threadIdx.x);
      const uint32_t q_tile = q_smem + slot * QueryTile::kBytes, do_tile = do_smem + slot * GradientTile::kBytes;
      const auto k_lane = LaneAddress<KeyTile>::by_rows(k_smem, warp_key, 0, thread);
      const auto v_lane = LaneAddress<ValueTile>::by_rows(v_smem, warp_key, 0, thread);
      Accumulators<1, kBlocks> scores, gradients;
      multiply_transposed<kDtype, Config::kHeadDimQk / 16>(
          scores, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, k_lane.at(0, i)); },
          LaneAddress<QueryTile>::by_columns(q_tile, 0, thread));
      multiply_transposed<kDtype, Config::kHeadDimV / 16>(
          gradients, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, v_lane.at(0, i)); },
          LaneAddress<GradientTile>::by_columns(do_tile, 0, thread));

      // P^T and dS^T
      const auto differentiate = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        [[maybe_unused]] Accumulators<1, kBlocks> softcap_derivative;
        const ScoreGradientStep<Config::kClass, true> of_scores{arguments, mask,  static_cast<int>(ptx::again(first_key)),
                                                                start_m,   drops, lane};
        const float scale = of_scores.transform(scores, softcap_derivative);
        if constexpr (kMasked) of_scores.mask(scores);
        of_scores.to_weights(scores, scale, [&](int, int n, int e) { return statistics.lse[column(n, e)]; });
        of_scores.template to_gradients<kMasked>(gradients, scores, [&](int, int n, int e) { return statistics.delta[column(n, e)]; });
        of_scores.through_softcap(gradients, softcap_derivative);
      };
      if (visit.is_full) {
        differentiate(std::false_type());
      } else {
        differentiate(std::true_type());
      }
      PackedWeights<kBlocks> weights, dscores;
      pack_weights<kDtype>(weights, scores);
      pack_weights<kDtype>(dscores, gradients);
      const uint32_t later = ptx::again(threadIdx.x);
      store_packed<ScoreTile>(dscores, shared.ds.bytes, warp_key, static_cast<int>(later % 32));

      // dV += P^T dO (BLOCK_N, HEAD_DIM_V)
      multiply_add_packed<kDtype>(dvalue, weights, LaneAddress<GradientTile>::by_rows(do_tile, 0, 0, later));
      uint32_t* turn = nullptr;
      if (in_order) {
        turn = arguments.turns + 1 + (batch * problem.num_heads + head) * arguments.turns_per_head + start_m / kBlockM;
        if (warp == 0) {
          const int before = turn_at<kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, batch, head, start_m, start_n, descending);
          while (lane == 0 && ptx::load_acquire(turn) != static_cast<uint32_t>(before)) continue;
        }
      }
      __syncthreads();  // all of dS is there

      // dK += dS^T Q (BLOCK_N, HEAD_DIM_QK), dQ += dS K (BLOCK_M, HEAD_DIM_QK)
      multiply_add_packed<kDtype>(dkey, dscores, LaneAddress<QueryTile>::by_rows(q_tile, 0, 0, later));
      Accumulators<Part::kMatrices, Part::kBlocks> dquery;
      const Part part(static_cast<int>(later / 32));
      multiply_scores_keys<kDtype, Part>(dquery, LaneAddress<ScoreTile>::by_columns(ds_smem, part.first_row() / 16, later),
                                         LaneAddress<KeyTile>::by_rows(k_smem, 0, part.column_group, later));
      const int columns = static_cast<int>(problem.head_dim_qk);
      const int64_t statistic = statistics_of(problem, sequence, ptx::again(batch), ptx::again(head)) + start_m;
      add_to_sums(dquery, part, arguments.dquery_sums + statistic * columns, sequence.rows_present - start_m, columns);
      __syncthreads();  // every warp is past its products with this tile, and has added
      if (in_order && threadIdx.x == 0) ptx::red_increment_release(turn);
      load();
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // K and V have landed and were read

  const int keys_left = keys - start_n;
  store_rows<kDtype, KeyTile>(dkey, problem.softmax_scale, shared.k.bytes, warp_key, keys_left, rows_of_keys(problem.dkey),
                              problem.dkey.row, static_cast<int>(problem.head_dim_qk));
  store_rows<kDtype, ValueTile>(dvalue, arguments.kept_scale, shared.v.bytes, warp_key, keys_left, rows_of_keys(problem.dvalue),
                                problem.dvalue.row, static_cast<int>(problem.head_dim_v));
}

}  // namespace fused_attention::cuda::sm80
