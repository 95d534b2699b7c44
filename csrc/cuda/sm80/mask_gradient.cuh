// SPDX-License-Identifier: Apache-2.0
// The gradient of a float attn_mask that batch elements or heads share, for compute capability 8.0 and newer. A block owns BLOCK_M x
// BLOCK_N elements of the mask and walks over the batch elements and, within each, the heads that share them, in order. Sums stay in
// registers and are written once; no atomics, so every run gives the same bits.
//
//   for each head whose tile is not empty:
//     S = Q K^T, dP = dO V^T      in chunks of 64 columns: one instance takes every head dim
//     P, dS                       from lse and delta, as in the other backward kernels
//     sum += dS                   the mask is added after softcap, so softcap's derivative plays no part
#pragma once
#include "../gradients.cuh"
#include "../row.cuh"
#include "../row_block.cuh"

namespace fused_attention::cuda::sm80 {

// A head whose tile is not empty.
struct MaskVisit {
  int batch, head, rows_present, keys_present;
  bool all_count;  // every score of rows that are present
};

struct MaskGradient : Row {
  static constexpr int kColumns = 64;           // of a chunk
  static constexpr int kPieces = kBlockN / 32;  // of 32 keys, processed one after the other
  static_assert(kBlockM == 16 * kWarps && kBlockM == kKeysPerTile && kBlockN == kKeysPerTile && kStages >= 2);

  struct SharedMemory {
    SharedTile<kBlockM, kColumns> left[kStages];   // of query or dout
    SharedTile<kBlockN, kColumns> right[kStages];  // of key or value
    MaskVisit visits[kThreads];
    int visits_of_warp[kWarps];
  };

  static FA_DEVICE void run(const BackwardArguments& arguments);
};

// Whether the rows from start_m on visit the tile of keys at start_n, and how. For a single thread.
FA_DEVICE bool visits_tile(const BackwardArguments& arguments, int start_m, int start_n, MaskVisit& visit) {
  const Sequence sequence(arguments.problem, visit.batch);
  visit.rows_present = sequence.rows_present, visit.keys_present = sequence.keys_present;
  const int last_row = min(start_m + kKeysPerTile, sequence.rows_present) - 1;
  if (last_row < start_m) return false;
  const TileLists& lists = arguments.tiles;
  if (lists.data == nullptr) {
    const KeyRange of_first = sequence.keys_of(start_m), of_last = sequence.keys_of(last_row);  // both ends move right from row to row
    visit.all_count = of_last.from <= start_n && of_first.to >= start_n + kKeysPerTile;
    return of_first.from < start_n + kKeysPerTile && of_last.to > start_n;
  }
  const int32_t* const list = of_head(lists.data, lists.batch, visit.batch, lists.head, visit.head) + start_m / kKeysPerTile * lists.line;
  // In lists[from, to), in ascending or descending order.
  const auto contains = [&](int from, int to, bool ascending) {
    const int end = to;
    while (from < to) {
      const int middle = (from + to) / 2, tile = list[2 + middle];
      const bool is_before = ascending ? tile < start_n / kKeysPerTile : tile > start_n / kKeysPerTile;
      from = is_before ? middle + 1 : from, to = is_before ? to : middle;
    }
    return from < end && list[2 + from] == start_n / kKeysPerTile;
  };
  visit.all_count = contains(0, list[0], true);
  return visit.all_count || contains(lists.num_tiles - list[1], lists.num_tiles, false);
}

FA_DEVICE void MaskGradient::run(const BackwardArguments& arguments) {
  auto& shared = shared_memory<MaskGradient>();
  MaskVisit* const visits = shared.visits;
  int* const visits_of_warp = shared.visits_of_warp;

  const AttentionProblem& problem = arguments.problem;
  const auto row_blocks = static_cast<uint32_t>((problem.seqlen_q + kBlockM - 1) / kBlockM);
  const auto key_blocks = static_cast<uint32_t>((problem.seqlen_k + kBlockN - 1) / kBlockN);
  const auto mask_heads = static_cast<uint32_t>(arguments.mask_heads);
  const uint32_t line = blockIdx.x / key_blocks;
  const int start_n = static_cast<int>(blockIdx.x % key_blocks) * kBlockN;
  const int start_m = static_cast<int>(line % row_blocks) * kBlockM;
  const int mask_head = static_cast<int>(line / row_blocks % mask_heads), mask_batch = static_cast<int>(line / row_blocks / mask_heads);
  // The heads that share this piece of the mask.
  const int heads = arguments.mask_heads == 1 ? static_cast<int>(problem.num_heads) : 1;
  const int64_t num_heads = (arguments.mask_batches == 1 ? problem.batch : 1) * heads;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = start_m + 16 * warp;
  const auto left_rows = shared.left[0].by_rows(16 * warp);
  const auto right_columns = shared.right[0].by_columns();
  const int qk_chunks = (static_cast<int>(problem.head_dim_qk) + kColumns - 1) / kColumns;
  const int v_chunks = (static_cast<int>(problem.head_dim_v) + kColumns - 1) / kColumns;
  const bool drops = problem.dropout_threshold != 0;
  Accumulators<1, 4> sums[kPieces] = {};

#pragma unroll 1
  for (int64_t first = 0; first < num_heads; first += kThreads) {
    // Which of the next kThreads heads visit the tile, listed in order.
    const int64_t number = first + threadIdx.x;
    MaskVisit own = {mask_batch + static_cast<int>(number / heads), mask_head + static_cast<int>(number % heads), 0, 0, false};
    const bool visiting = number < num_heads && visits_tile(arguments, start_m, start_n, own);
    const uint32_t voters = __ballot_sync(kWholeWarp, visiting);
    if (lane == 0) visits_of_warp[warp] = __popc(voters);
    __syncthreads();  // and the previous list has been read
    int place = __popc(voters & ((1u << lane) - 1)), num_visits = 0;
#pragma unroll
    for (int other = 0; other < kThreads / 32; ++other) {
      if (other < warp) place += visits_of_warp[other];
      num_visits += visits_of_warp[other];
    }
    if (visiting) visits[place] = own;
    __syncthreads();

    // Loads: every call is the next chunk and one group of cp.async, an empty one past the last chunk.
    int next_visit = 0, next_chunk = 0, next_slot = 0;
    const auto load = [&] {
      if (next_visit < num_visits) {
        const MaskVisit visit = visits[next_visit];
        const bool of_scores = next_chunk < qk_chunks;
        const int column = (of_scores ? next_chunk : next_chunk - qk_chunks) * kColumns;
        const int columns = static_cast<int>(of_scores ? problem.head_dim_qk : problem.head_dim_v) - column;
        const StridedTensor &left = of_scores ? problem.query : problem.dout, &right = of_scores ? problem.key : problem.value;
        const float* const row_lse =
            arguments.row_lse + (static_cast<int64_t>(visit.batch) * problem.num_heads + visit.head) * problem.seqlen_q;
        // Rows that attend to nothing may have any gradient.
        copy_rows_async<kThreads>(
            shared.left[next_slot], head_of(left, visit.batch, visit.head) + start_m * left.row + column, left.row, columns, threadIdx.x,
            [&](int row) { return start_m + row < visit.rows_present && (of_scores || row_lse[start_m + row] != kInfinity); });
        copy_rows_async<kThreads>(
            shared.right[next_slot], head_of(right, visit.batch, visit.head / arguments.heads_per_group) + start_n * right.row + column,
            right.row, columns, threadIdx.x, [&](int row) {
              const int key = start_n + row;
              return key < visit.keys_present && (problem.key_mask == nullptr ||
                                                  problem.key_mask[visit.batch * problem.key_mask_batch + key * problem.key_mask_key] != 0);
            });
        if (++next_chunk == qk_chunks + v_chunks) next_chunk = 0, ++next_visit;
        next_slot = next_slot + 1 == kStages ? 0 : next_slot + 1;
      }
      ptx::cp_async_commit();
    };
    int slot = 0;
    // products += left (BLOCK_M, head_dim) times the transpose of right (BLOCK_N, head_dim), each warp its own rows.
    const auto multiply_chunks = [&](Accumulators<1, 4>(&products)[kPieces], int chunks, int columns) {
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk, columns -= kColumns) {
        ptx::cp_async_wait<kStages - 2>();  // this chunk has landed
        __syncthreads();                    // and every warp is past the one before
        load();
        const auto left = left_rows[slot];
        const auto right = right_columns[slot];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (32 * half >= columns) break;
#pragma unroll
          for (int step = 2 * half; step < 2 * half + 2; ++step) {
            uint32_t a[4];
            left(step, 0, a);
#pragma unroll
            for (int n = 0; n < 4 * kPieces; n += 2) {
              uint32_t b[4];
              ptx::ldmatrix_x4(b, right.at(8 * n, step));
              multiply_step<kDtype>(products[n / 4][0], n % 4, a, b);
            }
          }
        }
        slot = slot + 1 == kStages ? 0 : slot + 1;
      }
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) load();

#pragma unroll 1
    for (int i = 0; i < num_visits; ++i) {
      const MaskVisit visit = visits[i];
      const Sequence sequence(problem, visit.batch);
      const int64_t statistics = (static_cast<int64_t>(visit.batch) * problem.num_heads + visit.head) * problem.seqlen_q;
      float lse[2], delta[2];  // of rows lane / 4 and 8 below
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half + lane / 4;
        const bool present = row < visit.rows_present;
        lse[half] = present ? arguments.row_lse[statistics + row] : kInfinity;
        delta[half] = present ? arguments.row_delta[statistics + row] : 0.0f;
      }
      Accumulators<1, 4> scores[kPieces] = {}, gradients[kPieces] = {};
      multiply_chunks(scores, qk_chunks, static_cast<int>(problem.head_dim_qk));
      multiply_chunks(gradients, v_chunks, static_cast<int>(problem.head_dim_v));

      // P, dS and their sum
      const ScoreMask mask{sequence, problem, visit.batch, visit.head};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const ScoreGradientStep<FeatureClass::bias, false> of_scores{arguments, mask, first_row, start_n + 32 * piece, drops, lane};
        Accumulators<1, 4> softcap_derivative;
        const float scale = of_scores.transform(scores[piece], softcap_derivative);
        if (!visit.all_count) of_scores.mask(scores[piece]);
        of_scores.to_weights(scores[piece], scale, [&](int, int, int e) { return lse[e / 2]; });
        of_scores.template to_gradients<true>(gradients[piece], scores[piece], [&](int, int, int e) { return delta[e / 2]; });
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[piece][0][n][e] += gradients[piece][0][n][e];
        }
      }
    }
    ptx::cp_async_wait<0>();
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    store_mask_gradient(arguments, sums[piece], mask_batch, mask_head, first_row, static_cast<int>(problem.seqlen_q), start_n + 32 * piece);
  }
}

}  // namespace fused_attention::cuda::sm80
