// SPDX-License-Identifier: Apache-2.0
// The forward kernel for up to BLOCK_N keys, compute capability 8.0 and newer: a group of warps keeps all keys and values of a batch
// element and key head in shared memory, and each of its warps computes 16 rows of one query head against them.
//
//   1. K and V by cp.async, 32 keys at a time, absent keys as zeros; only what exists is read
//   2. scores = Q K^T of whole rows in registers, 32 keys at a time, skipping those that no row of the warp attends to
//   3. the row's maximum, only once; weights, dropout, out = P V
//   4. out / row_sum through shared memory; lse
// Absent rows and keys cost only the zeros that are written.
#pragma once
#include "../dropout.cuh"
#include "../row.cuh"
#include "../scores.cuh"
#include "single_tile_layout.h"
#include "warp_groups.cuh"

namespace fused_attention::cuda::sm80 {

struct SingleTileForward : Row {
  static constexpr int kWords = kBlockN / kKeysPerWord, kSteps = kHeadDimQk / 16, kOutBlocks = kHeadDimV / 8;
  static_assert(kBlockM == 16 * kWarps && kBlockN % kKeysPerWord == 0 && kStages == 1);
  static_assert(kHeadDimV <= kHeadDimQk, "out goes where Q was");

  using QueryTile = SharedTile<16, kHeadDimQk>;  // of a warp
  using OutTile = SharedTile<16, kHeadDimV>;
  using KeyTile = SharedTile<kKeysPerWord, kHeadDimQk>;
  using ValueTile = SharedTile<kKeysPerWord, kHeadDimV>;

  static constexpr SingleTileForwardLayout kLargestUnit{kHeadDimQk, kHeadDimV, kWarps, kBlockN};
  static_assert(SharedBytes<kLargestUnit.bytes, kSharedBytes>::kAgree);

  static FA_DEVICE void run(const ForwardArguments& arguments);
};

FA_DEVICE void SingleTileForward::run(const ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  const WarpGroup group(arguments.units);
  if (!group.has_work) return;
  const int lane = threadIdx.x % 32, num_words = static_cast<int>((problem.seqlen_k + kKeysPerWord - 1) / kKeysPerWord);
  unsigned char* const shared = shared_bytes + group.number * arguments.units.shared_bytes;
  const SingleTileForwardLayout layout(kHeadDimQk, kHeadDimV, group.num_warps, num_words * kKeysPerWord);
  auto& q_tile = reinterpret_cast<QueryTile*>(shared + layout.q)[group.warp];
  auto* const k_tiles = reinterpret_cast<KeyTile*>(shared + layout.k);  // Lk / 32, rounded up
  auto* const v_tiles = reinterpret_cast<ValueTile*>(shared + layout.v);

  // The group's key head; the warp's query head and rows.
  const auto num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv), per_key_head = static_cast<uint32_t>(arguments.units.per_key_head);
  const auto row_pieces = static_cast<uint32_t>((problem.seqlen_q + 15) / 16);  // of a head
  const uint32_t line = group.unit / per_key_head, piece = group.unit % per_key_head * group.num_warps + group.warp;
  const int batch = static_cast<int>(line / num_heads_kv), key_head = static_cast<int>(line % num_heads_kv);
  const int head_of_group = static_cast<int>(piece / row_pieces), first_row = static_cast<int>(piece % row_pieces) * 16;
  const bool has_rows = head_of_group < arguments.heads_per_group;
  const int head = has_rows ? key_head * arguments.heads_per_group + head_of_group : 0;
  const Sequence sequence(problem, batch);
  const ScoreMask mask{sequence, problem, batch, head};

  // Which keys exist, and which of them each row of this warp may attend to: row `lane`, in the first 16 lanes.
  const int row_of_lane = has_rows && lane < 16 ? first_row + lane : sequence.rows_present;
  uint32_t existing[kWords], allowed[kWords], visited = 0;  // visited: bit w of word w
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int first_key = w * kKeysPerWord;
    existing[w] = kPlain ? bits_of({0, sequence.keys_present}, first_key) : existing_keys(problem, batch, sequence.keys_present, first_key);
  }

  // Loads: Q and K are one group of cp.async, V is another.
  const auto load_keys = [&](const StridedTensor& tensor, int columns, auto* tiles) {
    const uint16_t* const source = head_of(tensor, batch, key_head) + sequence.first_key * tensor.row;
    int next_warp = 0;  // to copy 32 keys: the warps take turns
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const bool is_mine = next_warp == group.warp;
      next_warp = next_warp + 1 == group.num_warps ? 0 : next_warp + 1;
      if (!is_mine || existing[w] == 0 || sequence.rows_present == 0) continue;
      copy_rows_async<32>(tiles[w], source + w * kKeysPerWord * tensor.row, tensor.row, columns, lane,
                          [&](int row) { return (existing[w] >> row & 1) != 0; });
    }
    ptx::cp_async_commit();
  };
  copy_rows_async<32>(q_tile, head_of(problem.query, batch, head) + (sequence.first_row + first_row) * problem.query.row, problem.query.row,
                      static_cast<int>(problem.head_dim_qk), lane,
                      [&](int row) { return has_rows && first_row + row < sequence.rows_present; });
  load_keys(problem.key, static_cast<int>(problem.head_dim_qk), k_tiles);
  load_keys(problem.value, static_cast<int>(problem.head_dim_v), v_tiles);

#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    allowed[w] = existing[w] == 0 ? 0 : allowed_keys<kPlain>(mask, row_of_lane, w * kKeysPerWord, existing[w]);
    visited |= __any_sync(kWholeWarp, allowed[w] != 0) << w;
  }
  ptx::cp_async_wait<1>();  // Q and K have landed
  group.sync();

  // S = Q K^T (16, Lk)
  const ScoreTransform transform(arguments, batch, head);
  const float factor_left = kPlain || (!kBias && transform.softcap_log2 == 0.0f && transform.slope_log2 == 0.0f) ? transform.factor : 1.0f;
  Accumulators<1, 4> scores[kWords];
  float largest[2] = {-kInfinity, -kInfinity};  // of rows lane / 4 and 8 below
  {
    uint32_t q[kSteps][4];
    const auto q_lane = q_tile.by_rows();
    const auto k_lane = k_tiles->by_columns();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) q_lane(i, 0, q[i]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if ((visited >> w & 1) == 0) continue;
      const int first_key = w * kKeysPerWord;
      Accumulators<1, 4>& piece_of_row = scores[w];
      [[maybe_unused]] std::conditional_t<kBias, Bias<1, 4>, NoBias> bias(problem, batch, head);
      bias.load(first_row, sequence.rows_present - 1, first_key);
      multiply_transposed<kDtype>(
          piece_of_row,
          [&](int i, int, uint32_t (&a)[4]) {
#pragma unroll
            for (int word = 0; word < 4; ++word) a[word] = q[i][word];
          },
          k_lane[w]);
      float scale = transform.factor;
      if constexpr (!kPlain) scale = transform.cap(piece_of_row);
      scale = bias.add_to(piece_of_row, scale);
      if constexpr (!kPlain) scale = transform.add_alibi(piece_of_row, scale, sequence.offset, first_row, first_key);
      const bool all_allowed = __all_sync(kWholeWarp, lane >= 16 || allowed[w] == kAllKeys);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!all_allowed) {
          const uint32_t word = __shfl_sync(kWholeWarp, allowed[w], lane / 4 + 8 * half) >> 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if ((word >> (8 * n + e) & 1) == 0) piece_of_row[0][n][2 * half + e] = -kInfinity;
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          largest[half] = fmaxf(largest[half], fmaxf(piece_of_row[0][n][2 * half], piece_of_row[0][n][2 * half + 1]));
        }
      }
    }
  }

  // P = exp2(S - row_max), O = dropout(P) V (16, HEAD_DIM_V). A sink is a first key without a value.
  const bool has_sink = !kPlain && problem.sinks != nullptr;
  OnlineSoftmax<1> softmax([&](int, int) { return has_sink ? problem.sinks[head] * kLog2E : -kInfinity; });
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) shift[half] = softmax.raise(0, half, quad_max(largest[half]) * factor_left);
  const bool drops = kPlain ? kDropout : problem.dropout_threshold != 0;
  Dropout dropout;
  if (drops) dropout = Dropout(problem, batch, head);
  Accumulators<1, kOutBlocks> acc = {};
  const auto v_lane = v_tiles->by_rows();
  ptx::cp_async_wait<0>();  // V has landed
  group.sync();
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if ((visited >> w & 1) == 0) continue;
    Accumulators<1, 4>& weights = scores[w];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[0][n][e] = ptx::ex2(fmaf(weights[0][n][e], factor_left, -shift[e / 2]));
        softmax.row_sum[0][e / 2] += weights[0][n][e];
      }
    }
    if (drops) dropout.apply(weights, first_row, w * kKeysPerWord);
    multiply_add<kDtype>(acc, weights, v_lane[w]);
  }

  // out = O / row_sum. All rows in memory are written.
  softmax.sum_over_quads();
  const int rows = has_rows ? sequence.rows - first_row : 0;                                   // from this warp's first row on
  float* const lse = problem.lse + statistics_of(problem, sequence, batch, head) + first_row;  // (rows,)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    const bool present = first_row + row < sequence.rows_present;
    const float factor = softmax.reciprocal_sum(0, half) * arguments.kept_scale;
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) acc[0][n][e] = present ? acc[0][n][e] * factor : 0.0f;
    }
    if (lane % 4 == 0 && row < rows) lse[row] = present ? softmax.lse(0, half) : -kInfinity;
  }
  uint16_t* const out = head_of(problem.out, batch, head) + (sequence.first_row + first_row) * problem.out.row;  // (rows, Dv)
  store_rows<kDtype>(acc, 1.0f, reinterpret_cast<OutTile&>(q_tile), 0, rows, out, problem.out.row, static_cast<int>(problem.head_dim_v));
}

}  // namespace fused_attention::cuda::sm80
