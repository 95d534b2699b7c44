// SPDX-License-Identifier: Apache-2.0
// All three gradients in one pass, for compute capability 8.0 and newer. A block owns BLOCK_N keys of one key head and visits the rows that
// see them, one query head of the group after another; scores are computed only once.
//
//   S^T = K Q^T, dP^T = V dO^T       (keys x rows), 16 keys per warp; already in registers as the left operands of
//   dvalue += P^T dO, dkey += dS^T Q
//   dS -> shared memory; dS K        (rows x Dqk), split among all warps, is added to float32 sums of dquery in global memory
//
// backward_delta.cuh runs before and clears the sums; backward_dquery.cuh runs after and turns them into dquery. Blocks add in any order,
// or in a fixed one: with `turns`, a block takes a ticket, which decides its keys, and adds to a tile of rows once all blocks with smaller
// tickets that visit the tile have. Those blocks are already running, so the wait ends however few blocks a GPU runs at a time.
// docs/cuda-kernels.md describes the order.
#pragma once
#include "../gradients.cuh"
#include "../key_block.cuh"
#include "backward_tiles.cuh"
#include "query_sums.cuh"
#include "row_visits.cuh"

namespace fused_attention::cuda::sm80 {

struct Backward : BackwardTiles {
  static_assert(kBlockN == 16 * kWarps && kBlockM % 32 == 0);
  static_assert(kPlain || kBlockN == kKeysPerTile, "lists have tiles of that many keys");
  static_assert(2 * kBlockM <= kThreads, "a thread copies one number of a row");

  static constexpr int kBlocks = kBlockM / 8;
  using Part = QueryPart<kBlockM, kHeadDimQk, kWarps>;
  using Visits = RowVisits<kBlockM, !kPlain>;
  struct SharedMemory {
    KeyTile k;                        // at the end dkey
    ValueTile v;                      // at the end dvalue
    SharedTile<kBlockN, kBlockM> ds;  // dS^T
    QueryTile q[kStages];
    GradientTile dout[kStages];
    RowStatistics<kBlockM> statistics[kStages];
  };

  static FA_DEVICE void run(const OnePassArguments& arguments);
};

// The next value of a counter, for the whole block. shared: room for it.
FA_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t* shared) {
  if (threadIdx.x == 0) *shared = ptx::atomic_add(counter, 1);
  __syncthreads();
  const uint32_t ticket = *shared;
  __syncthreads();
  return ticket;
}

FA_DEVICE void Backward::run(const OnePassArguments& arguments) {
  auto& shared = shared_memory<Backward>();

  // Which keys: if the last ones are seen by the fewest rows, they go first, so that the blocks that add first have the least to do before.
  const AttentionProblem& problem = arguments.problem;
  const bool in_order = arguments.turns != nullptr;
  const uint32_t number = in_order ? take_ticket(arguments.turns, reinterpret_cast<uint32_t*>(&shared)) : blockIdx.x;
  // If every row sees every key by position and the order is free, blocks start at different rows.
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
  const auto rows_of_keys = [&](const StridedTensor& tensor) {  // recomputed, so that nothing stays in registers until the end
    return head_of(tensor, ptx::again(batch), ptx::again(key_head)) + (sequence.first_key + ptx::again(start_n)) * tensor.row;
  };

  const ScoreMask key_mask{sequence, problem, batch, 0};
  const auto exists = [&](int row) { return kPlain ? start_n + row < sequence.keys_present : key_mask.key_exists(start_n + row); };
  copy_rows_async<kThreads>(shared.k, rows_of_keys(problem.key), problem.key.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                            exists);
  copy_rows_async<kThreads>(shared.v, rows_of_keys(problem.value), problem.value.row, static_cast<int>(problem.head_dim_v), threadIdx.x,
                            exists);
  ptx::cp_async_commit();

  const bool has_all_keys = __syncthreads_and(exists(static_cast<int>(threadIdx.x) % kBlockN)) != 0;
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;
  Accumulators<1, kHeadDimQk / 8> dkey = {};
  Accumulators<1, kHeadDimV / 8> dvalue = {};

  const auto visits_of = [&](int head) {
    const int start = static_cast<int>(ptx::again(start_n));
    const SeeingRows<kBlockN> rows(sequence, start, has_all_keys);
    const float before = static_cast<float>(start / kBlockN), blocks = static_cast<float>((problem.seqlen_k + kBlockN - 1) / kBlockN);
    return Visits(rows.of_first, rows.of_last, arguments.column_tiles, batch, head, start / kKeysPerTile, spreads ? before / blocks : 0.0f);
  };
  const Visits of_all_heads = visits_of(key_head);  // if there are no lists
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
        // Recomputed, so that they take no registers between loads.
        const int its_batch = ptx::again(batch), its_head = ptx::again(head);
        const uint32_t thread = ptx::again(threadIdx.x);
        const int64_t first_row = sequence.first_row + start_m, statistic = statistics_of(problem, sequence, its_batch, its_head) + start_m;
        const uint16_t* const query = head_of(problem.query, its_batch, its_head) + first_row * problem.query.row;  // (Lq - start_m, Dqk)
        const uint16_t* const dout = head_of(problem.dout, its_batch, its_head) + first_row * problem.dout.row;     // (Lq - start_m, Dv)
        const float *const row_lse = arguments.row_lse + statistic, *const row_delta = arguments.row_delta + statistic;
        copy_rows_async<kThreads>(shared.q[slot], query, problem.query.row, static_cast<int>(problem.head_dim_qk), thread,
                                  [&](int row) { return row < rows_left; });
        // Rows that attend to nothing may have any gradient.
        copy_rows_async<kThreads>(shared.dout[slot], dout, problem.dout.row, static_cast<int>(problem.head_dim_v), thread,
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
      // Addresses are recomputed in each step, so that they take no registers between steps.
      const uint32_t thread = ptx::again(threadIdx.x);
      const auto& q = shared.q[slot];
      const auto& dout = shared.dout[slot];
      Accumulators<1, kBlocks> scores, gradients;
      multiply_transposed<kDtype>(scores, shared.k.by_rows(warp_key, 0, thread), q.by_columns(0, thread));
      multiply_transposed<kDtype>(gradients, shared.v.by_rows(warp_key, 0, thread), dout.by_columns(0, thread));

      // P^T and dS^T
      const auto differentiate = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        [[maybe_unused]] Accumulators<1, kBlocks> softcap_derivative;
        const ScoreGradientStep<kClass, true> of_scores{arguments, mask, static_cast<int>(ptx::again(first_key)), start_m, drops, lane};
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
      store_packed(dscores, shared.ds, static_cast<int>(later / 32 * 16), static_cast<int>(later % 32));

      // dV += P^T dO (BLOCK_N, HEAD_DIM_V)
      multiply_add_packed<kDtype>(dvalue, weights, dout.by_rows(0, 0, later));
      uint32_t* turn = nullptr;
      if (in_order) {
        turn = arguments.turns + 1 + (batch * problem.num_heads + head) * arguments.turns_per_head + start_m / kBlockM;
        if (warp == 0) {
          const int before = turn_at<kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, batch, head, start_m, start_n, descending);
          while (lane == 0 && ptx::load_acquire(turn) != static_cast<uint32_t>(before)) continue;
        }
      }
      __syncthreads();  // all of dS is in shared memory

      // dK += dS^T Q (BLOCK_N, HEAD_DIM_QK), dQ += dS K (BLOCK_M, HEAD_DIM_QK)
      multiply_add_packed<kDtype>(dkey, dscores, q.by_rows(0, 0, later));
      Accumulators<Part::kMatrices, Part::kBlocks> dquery;
      const Part part(static_cast<int>(later / 32));
      multiply_scores_keys<kDtype, Part>(dquery, shared.ds.by_columns(part.first_row() / 16, later),
                                         shared.k.by_rows(0, part.column_group, later));
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
  store_rows<kDtype>(dkey, problem.softmax_scale, shared.k, warp_key, keys_left, rows_of_keys(problem.dkey), problem.dkey.row,
                     static_cast<int>(problem.head_dim_qk));
  store_rows<kDtype>(dvalue, arguments.kept_scale, shared.v, warp_key, keys_left, rows_of_keys(problem.dvalue), problem.dvalue.row,
                     static_cast<int>(problem.head_dim_v));
}

}  // namespace fused_attention::cuda::sm80
