// SPDX-License-Identifier: Apache-2.0
// The backward kernel for up to BLOCK_N keys, compute capability 8.0 and newer: one launch computes every gradient. A group of warps holds
// all keys and values of a batch element and key head, and visits the rows of the query heads that share them, BLOCK_M at a time.
//
//   1. K, V and Q by cp.async, zeros where absent; dO through registers, next to O, for delta = rowsum(dO * O) - dlse
//   2. S^T = K Q^T and dP^T = V dO^T, 16 keys per warp: P^T and dS^T are already in registers as the left operands of dV += P^T dO and
//      dK += dS^T Q, which stay in registers until the end
//   3. dS^T through shared memory; with all keys at hand, dQ = dS K of these rows is complete: the warps split it
// No atomics and no float32 sums in global memory: every sum has a fixed order, and every run gives the same bits.
#pragma once
#include "../row.cuh"
#include "single_tile_layout.h"
#include "transposed_stores.cuh"
#include "warp_groups.cuh"

namespace fused_attention::cuda::sm80 {

// The 16 keys of a warp.
struct KeysOfWarp {
  int batch, key_head, first_key;
  Sequence sequence;
  int keys;  // of the sequence, in memory

  FA_DEVICE KeysOfWarp(const AttentionProblem& problem, const WarpGroup& group)
      : batch(static_cast<int>(group.unit / static_cast<uint32_t>(problem.num_heads_kv))),
        key_head(static_cast<int>(group.unit % static_cast<uint32_t>(problem.num_heads_kv))),
        first_key(kRowsPerWarp * group.warp),
        sequence(problem, batch),
        keys(problem.cu_seqlens_k == nullptr ? static_cast<int>(problem.seqlen_k) : sequence.keys_present) {}

  FA_DEVICE uint16_t* rows_of(const StridedTensor& tensor) const {
    return head_of(tensor, batch, key_head) + (sequence.first_key + first_key) * tensor.row;
  }
};

// A warp's work: its keys and, step by step, the rows of the heads that share them. A step is a tile of BLOCK_M rows of one head.
struct SingleTileBackward : Row {
  static_assert(kBlockM == 32, "a lane has the mask word of one row");
  static_assert(kBlockN == 16 * kWarps && kHeadDimV == kHeadDimQk, "dkey and dvalue go where the warp's rows of V were");

  static constexpr int kBlocks = kBlockM / 8;
  using KeyTile = SharedTile<16, kHeadDimQk>;  // of a warp, as the next two
  using ValueTile = SharedTile<16, kHeadDimV>;
  using ScoreTile = SharedTile<16, kBlockM>;  // dS^T
  using QueryTile = SharedTile<kBlockM, kHeadDimQk>;
  using GradientTile = SharedTile<kBlockM, kHeadDimV>;  // of dout

  // The shared memory of a group of warps.
  struct Memory {
    struct RowTile {
      QueryTile q;
      GradientTile dout;
      float lse[kBlockM], delta[kBlockM];
    };
    KeyTile* keys;  // of each warp, as the next two
    ValueTile* values;
    ScoreTile* scores;
    RowTile* rows;       // row_tiles_in_flight of them
    int* has_gradients;  // (warps,)
    float* slope_parts;  // (warps,)

    FA_DEVICE Memory(const WarpGroup& group, const SingleTileUnits& units)
        : keys(reinterpret_cast<KeyTile*>(shared_bytes + group.number * units.shared_bytes)),
          values(reinterpret_cast<ValueTile*>(keys + group.num_warps)),
          scores(reinterpret_cast<ScoreTile*>(values + group.num_warps)),
          rows(reinterpret_cast<RowTile*>(scores + group.num_warps)),
          has_gradients(reinterpret_cast<int*>(rows + units.row_tiles_in_flight)),
          slope_parts(reinterpret_cast<float*>(has_gradients + group.num_warps)) {}
  };
  // Memory steps from one array to the next, which takes fewer registers than the layout's offsets.
  static constexpr SingleTileBackwardLayout kLargestUnit{kHeadDimQk, kHeadDimV, kBlockM, kWarps, kStages};
  static_assert(SharedBytes<kLargestUnit.bytes, kSharedBytes>::kAgree);
  static_assert(kLargestUnit.row_tile == sizeof(Memory::RowTile));
  static_assert(kLargestUnit.values == kWarps * KeyTile::kBytes);
  static_assert(kLargestUnit.scores == kLargestUnit.values + kWarps * ValueTile::kBytes);
  static_assert(kLargestUnit.rows == kLargestUnit.scores + kWarps * ScoreTile::kBytes);
  static_assert(kLargestUnit.has_gradients == kLargestUnit.rows + kStages * kLargestUnit.row_tile);

  static FA_DEVICE void run(const BackwardArguments& arguments);

  const BackwardArguments& arguments;
  const AttentionProblem& problem;
  const WarpGroup& group;
  const KeysOfWarp& keys;
  const Sequence& sequence;
  const Memory memory;
  const int lane, first_head, row_tiles, num_steps;
  const bool drops, stores_mask_gradient;

  FA_DEVICE SingleTileBackward(const BackwardArguments& given, const WarpGroup& warps, const KeysOfWarp& of_warp)
      : arguments(given),
        problem(given.problem),
        group(warps),
        keys(of_warp),
        sequence(of_warp.sequence),
        memory(warps, given.units),
        lane(threadIdx.x % 32),
        first_head(of_warp.key_head * given.heads_per_group),
        row_tiles((sequence.rows_present + kBlockM - 1) / kBlockM),
        num_steps(row_tiles * given.heads_per_group),
        drops(kPlain ? kDropout : problem.dropout_threshold != 0),
        stores_mask_gradient(kBias && given.dattn_mask.data != nullptr) {}

  FA_DEVICE int head_of_step(int step) const {
    return first_head + static_cast<int>(static_cast<uint32_t>(step) / static_cast<uint32_t>(row_tiles));
  }
  FA_DEVICE int start_of_step(int step) const {
    return static_cast<int>(static_cast<uint32_t>(step) % static_cast<uint32_t>(row_tiles)) * kBlockM;
  }

  // The warp's K and V, one group of cp.async. existing: bit b if key b of the 16 counts.
  FA_DEVICE void load_keys(uint32_t existing) const {
    const auto exists = [&](int row) { return (existing >> row & 1) != 0; };
    copy_rows_async<32>(memory.keys[group.warp], keys.rows_of(problem.key), problem.key.row, static_cast<int>(problem.head_dim_qk), lane,
                        exists);
    copy_rows_async<32>(memory.values[group.warp], keys.rows_of(problem.value), problem.value.row, static_cast<int>(problem.head_dim_v),
                        lane, exists);
    ptx::cp_async_commit();
  }

  // The rows of up to `count` steps, by all warps of the group. UNROLL: of the loop over rows of dO.
  template <int UNROLL>
  FA_DEVICE void load_steps(int first_step, int count, int first_slot) const {
    count = min(count, num_steps - first_step);
    load_queries(first_step, count, first_slot);
    load_douts<UNROLL>(first_step, count, first_slot);
  }

  // Q, 8 rows at a time: one group of cp.async.
  FA_DEVICE void load_queries(int first_step, int count, int first_slot) const {
    using Piece = SharedTile<8, kHeadDimQk>;  // of a QueryTile
#pragma unroll 1
    for (int piece = group.warp; piece < kBlockM / 8 * count; piece += group.num_warps) {
      const int of_step = piece / (kBlockM / 8), row_in_tile = piece % (kBlockM / 8) * 8, step = first_step + of_step;
      const int first_row = start_of_step(step) + row_in_tile;
      const uint16_t* const query =
          head_of(problem.query, keys.batch, head_of_step(step)) + (sequence.first_row + first_row) * problem.query.row;
      unsigned char* const target = memory.rows[first_slot + of_step].q.bytes + row_in_tile * QueryTile::kPitch;
      copy_rows_async<32>(*reinterpret_cast<Piece*>(target), query, problem.query.row, static_cast<int>(problem.head_dim_qk), lane,
                          [&](int row) { return first_row + row < sequence.rows_present; });
    }
    ptx::cp_async_commit();
  }

  // dO through registers, as many rows at once as a warp's lanes hold, along with lse and delta = rowsum(dO * O) - dlse.
  template <int UNROLL>
  FA_DEVICE void load_douts(int first_step, int count, int first_slot) const {
    constexpr int kLanes = GradientTile::kPermuted, kRowsAtOnce = 32 / kLanes, kChunks = kHeadDimV / (kLanes * kChunk);
#pragma unroll(UNROLL)
    for (int item = group.warp * kRowsAtOnce + lane / kLanes; item < kBlockM * count; item += group.num_warps * kRowsAtOnce) {
      const int of_step = item / kBlockM, row_in_tile = item % kBlockM, step = first_step + of_step;
      auto& tile = memory.rows[first_slot + of_step];
      const int head = head_of_step(step), row = start_of_step(step) + row_in_tile;
      const bool present = row < sequence.rows_present;
      const int64_t place = statistics_of(problem, sequence, keys.batch, head) + row;
      const float row_lse = present ? problem.lse[place] : -kInfinity;
      const bool attends = row_lse != -kInfinity;  // if not, its dO may be anything
      const uint16_t* const out = head_of(problem.out, keys.batch, head) + (sequence.first_row + row) * problem.out.row;
      const uint16_t* const dout = head_of(problem.dout, keys.batch, head) + (sequence.first_row + row) * problem.dout.row;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = lane % kLanes + i * kLanes, column = chunk * kChunk;
        uint4 left = {}, right = {};
        if (present && column < problem.head_dim_v) {
          left = *reinterpret_cast<const uint4*>(out + column);
          right = *reinterpret_cast<const uint4*>(dout + column);
        }
        if (!attends) right = {};
        *reinterpret_cast<uint4*>(tile.dout.bytes + GradientTile::offset(row_in_tile, chunk)) = right;
        sum = add_dot<kDtype>(sum, left, right);
      }
      sum = sum_of_lanes<kLanes>(sum);
      if (lane % kLanes == 0) {
        if (attends && problem.dlse != nullptr) sum -= problem.dlse[place];
        tile.lse[row_in_tile] = attends ? row_lse * kLog2E : kInfinity;
        tile.delta[row_in_tile] = attends ? sum : 0.0f;
      }
    }
  }

  // P^T and dS^T of a tile (16, BLOCK_M); dS^T also goes to shared memory, for the other warps. Adds to the sums.
  //   allowed: for row `lane`, bit b if it may attend to key b of the 16
  FA_DEVICE void compute_gradients(const ScoreMask& mask, uint32_t allowed, int start_m, int slot, Accumulators<1, kBlocks>& weights,
                                   Accumulators<1, kBlocks>& gradients, ScoreGradientSums& sums) const {
    const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };
    const auto& rows = memory.rows[slot];
    const ScoreGradientStep<kClass, true> of_scores{arguments, mask, keys.first_key, start_m, drops, lane};
    [[maybe_unused]] Accumulators<1, kBlocks> softcap_derivative;

    // S^T = K Q^T (16, BLOCK_M), and P^T
    multiply_transposed<kDtype>(weights, memory.keys[group.warp].by_rows(), rows.q.by_columns());
    const float scale = of_scores.transform(weights, softcap_derivative);
    if (!__all_sync(kWholeWarp, allowed == 0xffff)) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t of_row = __shfl_sync(kWholeWarp, allowed, column(n, e)) >> lane / 4;
          if ((of_row & 1) == 0) weights[0][n][e] = -kInfinity;
          if ((of_row >> 8 & 1) == 0) weights[0][n][e + 2] = -kInfinity;
        }
      }
    }
    of_scores.to_weights(weights, scale, [&](int, int n, int e) { return rows.lse[column(n, e)]; });

    // dP^T = V dO^T (16, BLOCK_M), and dS^T; late, when what P^T was made from no longer needs registers
    multiply_transposed<kDtype>(gradients, memory.values[group.warp].by_rows(), rows.dout.by_columns());
    of_scores.template to_gradients<true>(gradients, weights, [&](int, int n, int e) { return rows.delta[column(n, e)]; });
    if constexpr (kBias) {
      if (stores_mask_gradient) store_mask_gradient_transposed(arguments, gradients, keys.batch, mask.head, keys.first_key, start_m);
      if (arguments.column_sums != nullptr) sums.add_lines(gradients);
    }
    if constexpr (!kPlain) {
      if (arguments.slope_sums != nullptr) sums.add_slope(gradients, of_scores);
    }
    of_scores.through_softcap(gradients, softcap_derivative);

    PackedWeights<kBlocks> packed;
    pack_weights<kDtype>(packed, gradients);
    store_packed(packed, memory.scores[group.warp], 0, lane);
  }

  // After the last rows of a head: stores the sums and resets them.
  FA_DEVICE void finish_sums(int head, ScoreGradientSums& sums) const {
    if constexpr (!kPlain) {
      if (arguments.slope_sums != nullptr) {
        const float of_warp = sum_of_lanes(sums.slope);
        if (lane == 0) memory.slope_parts[group.warp] = of_warp;
        sums.slope = 0.0f;
      }
    }
    if constexpr (kBias) {
      if (arguments.column_sums != nullptr) {
        sums.store_lines(arguments.column_sums + (keys.batch * problem.num_heads + head) * problem.seqlen_k + keys.first_key,
                         keys.keys - keys.first_key);
        sums.lines[0] = sums.lines[1] = 0.0f;
      }
    }
  }

  // The slope's gradient, from the warps' parts.
  FA_DEVICE void store_slope_gradient(int head) const {
    if constexpr (!kPlain) {
      if (arguments.slope_sums == nullptr || group.warp != 0 || lane != 0) return;
      float sum = 0.0f;
      for (int from = 0; from < group.num_warps; ++from) sum += memory.slope_parts[from];
      const int64_t parts = (problem.seqlen_q + kRowsPerSlopePart - 1) / kRowsPerSlopePart;
      arguments.slope_sums[(keys.batch * problem.num_heads + head) * parts] = sum;
    }
  }

  // dQ = scale * dS K (BLOCK_M, HEAD_DIM_QK) over all warps' keys, in pieces of 16 x 32.
  FA_DEVICE void store_dquery(int head, int start_m) const {
    const int rows_left = sequence.rows - start_m, rows_present_left = sequence.rows_present - start_m;
    uint16_t* const dquery = head_of(problem.dquery, keys.batch, head) + (sequence.first_row + start_m) * problem.dquery.row;
    // Transposed: rows of dS are columns of the tile.
    const uint32_t thread = ptx::again(threadIdx.x);  // recomputed, so that addresses take no registers elsewhere
    const int lane = static_cast<int>(thread % 32);
    const auto ds_lane = memory.scores->by_columns(0, thread);
    const auto k_rows = memory.keys->by_rows(0, 0, thread);
#pragma unroll 1
    for (int piece = group.warp; piece < kBlockM / 16 * (kHeadDimQk / 32); piece += group.num_warps) {
      const int upper_rows = piece % (kBlockM / 16), columns = piece / (kBlockM / 16);  // in units of 16, of 32
      if (16 * upper_rows >= rows_left) continue;
      Accumulators<1, 4> acc = {};
#pragma unroll 2
      for (int from = 0; from < group.num_warps; ++from) {
        if (memory.has_gradients[from] == 0) continue;
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, ds_lane.at(16 * from, upper_rows));
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, k_rows.at(16 * from, 2 * columns + n / 2));
          multiply_step<kDtype>(acc[0], n, a, b);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * upper_rows + 8 * half + lane / 4, chunk_column = 32 * columns + lane % 4 * kChunk;
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          words[n] = ptx::pack<kDtype>(acc[0][n][2 * half] * problem.softmax_scale, acc[0][n][2 * half + 1] * problem.softmax_scale);
        }
        transpose_quads(words);
        if (row < rows_left && chunk_column < problem.head_dim_qk) {
          const bool present = row < rows_present_left;
          *reinterpret_cast<uint4*>(dquery + row * problem.dquery.row + chunk_column) =
              present ? uint4{words[0], words[1], words[2], words[3]} : uint4{};
        }
      }
    }
  }

  // dV and dK, through the warp's rows of V, which it has read already.
  FA_DEVICE void store_key_gradients(const Accumulators<1, kHeadDimV / 8>& dvalue, const Accumulators<1, kHeadDimQk / 8>& dkey) const {
    const int keys_left = keys.keys - keys.first_key;
    ValueTile& tile = memory.values[group.warp];
    __syncwarp();
    store_rows<kDtype>(dvalue, arguments.kept_scale, tile, 0, keys_left, keys.rows_of(problem.dvalue), problem.dvalue.row,
                       static_cast<int>(problem.head_dim_v));
    __syncwarp();
    store_rows<kDtype>(dkey, problem.softmax_scale, tile, 0, keys_left, keys.rows_of(problem.dkey), problem.dkey.row,
                       static_cast<int>(problem.head_dim_qk));
  }

  // Rows beyond the last tile: their gradients of query and of the mask are 0.
  FA_DEVICE void clear_absent_rows() const {
    const int first_absent = row_tiles * kBlockM;
    for (int head = first_head; head < first_head + arguments.heads_per_group; ++head) {
      uint16_t* const dquery = head_of(problem.dquery, keys.batch, head) + sequence.first_row * problem.dquery.row;
      for (int row = first_absent + group.warp; row < sequence.rows; row += group.num_warps) {
        for (int column = lane * kChunk; column < problem.head_dim_qk; column += 32 * kChunk) {
          *reinterpret_cast<uint4*>(dquery + row * problem.dquery.row + column) = uint4{};
        }
      }
      if (!stores_mask_gradient) continue;
      for (int start_m = first_absent; start_m < sequence.rows; start_m += kBlockM) store_no_mask_gradient(head, start_m);
    }
  }

  FA_DEVICE void store_no_mask_gradient(int head, int start_m) const {
    const Accumulators<1, kBlocks> none = {};
    store_mask_gradient_transposed(arguments, none, keys.batch, head, keys.first_key, start_m);
  }
};

FA_DEVICE void SingleTileBackward::run(const BackwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  const WarpGroup group(arguments.units);
  if (!group.has_work) return;
  const KeysOfWarp keys(problem, group);
  const SingleTileBackward unit(arguments, group, keys);
  const Sequence& sequence = keys.sequence;
  const int tiles_in_flight = arguments.units.row_tiles_in_flight;

  // Which keys exist: of the 32 that include the warp's 16, then of the 16.
  const int keys_word = keys.first_key / kKeysPerWord * kKeysPerWord, shift = keys.first_key % kKeysPerWord;
  const uint32_t word =
      kPlain ? bits_of({0, sequence.keys_present}, keys_word) : existing_keys(problem, keys.batch, sequence.keys_present, keys_word);
  const uint32_t existing = sequence.rows_present > 0 ? word >> shift & 0xffff : 0;
  unit.load_keys(existing);
  unit.load_steps<2>(0, tiles_in_flight, 0);

  Accumulators<1, kHeadDimQk / 8> dkey = {};
  Accumulators<1, kHeadDimV / 8> dvalue = {};
  ScoreGradientSums sums;  // of one head
  int head = unit.first_head, start_m = 0, slot = 0;
#pragma unroll 1
  for (int step = 0; step < unit.num_steps; ++step) {
    ptx::cp_async_wait<0>();  // these rows have landed, and K and V; groups issued since then had a product's time to arrive
    group.sync();
    const ScoreMask mask{sequence, problem, keys.batch, head};
    const bool last_of_head = start_m + kBlockM >= sequence.rows_present;
    // Bit b: whether this lane's row may attend to key b of the 16.
    const uint32_t allowed = existing == 0 ? 0 : allowed_keys<kPlain>(mask, start_m + unit.lane, keys_word, word) >> shift & 0xffff;
    const bool visits = __any_sync(kWholeWarp, allowed != 0);
    if (visits) {
      Accumulators<1, kBlocks> weights, gradients;
      unit.compute_gradients(mask, allowed, start_m, slot, weights, gradients, sums);
      // dV += P^T dO (16, HEAD_DIM_V) and dK += dS^T Q (16, HEAD_DIM_QK)
      multiply_add<kDtype>(dvalue, weights, unit.memory.rows[slot].dout.by_rows());
      multiply_add<kDtype>(dkey, gradients, unit.memory.rows[slot].q.by_rows());
    } else if (unit.stores_mask_gradient) {
      unit.store_no_mask_gradient(head, start_m);
    }
    if (last_of_head) unit.finish_sums(head, sums);
    if (unit.lane == 0) unit.memory.has_gradients[group.warp] = visits;
    group.sync();  // dS is complete, and every warp is done with these rows
    unit.load_steps<kHeadDimQk <= 64 ? 2 : 1>(step + tiles_in_flight, 1, slot);
    unit.store_dquery(head, start_m);
    if (last_of_head) unit.store_slope_gradient(head);
    slot = slot + 1 == tiles_in_flight ? 0 : slot + 1;
    start_m += kBlockM;
    if (last_of_head) start_m = 0, ++head;
  }
  ptx::cp_async_wait<0>();  // the warp's own V, which its gradients overwrite

  // Recomputed, so that it takes no registers in the loop above.
  const WarpGroup done(arguments.units, ptx::again(threadIdx.x));
  const KeysOfWarp keys_done(problem, done);
  const SingleTileBackward unit_done(arguments, done, keys_done);
  unit_done.store_key_gradients(dvalue, dkey);
  unit_done.clear_absent_rows();
}

}  // namespace fused_attention::cuda::sm80
