// SPDX-License-Identifier: Apache-2.0
// The backward kernel for up to BLOCK_N keys, compute capability 8.0 and newer: one launch computes every gradient. A group of warps has
// all keys and values of a batch element and key head, and takes the rows of the query heads that share them, BLOCK_M at a time.
//
//   1. K, V and Q by cp.async, what is absent as zeros; dO through registers, where it meets out: delta = rowsum(dO * O) - dlse
//   2. S^T = K Q^T and dP^T = V dO^T, 16 keys to a warp: P^T and dS^T are, in the registers where they were computed, the left operands of
//      dV += P^T dO and dK += dS^T Q, which stay in registers until the end
//   3. dS^T through shared memory; all keys being here, dQ = dS K of these rows is whole: the warps share it out
// No atomics and no float32 sums in global memory: every sum has one order, and two runs give the same bits.
#pragma once
#include "short_gradients.cuh"
#include "short_units.cuh"

namespace fused_attention::cuda::sm80 {

template <Dtype DTYPE, int HEAD_DIM_QK, int HEAD_DIM_V, FeatureClass CLASS, bool DROPOUT, int BLOCK_M, int BLOCK_N, int NUM_WARPS,
          int STAGES>
struct ShortBackwardConfig {
  static constexpr Dtype kDtype = DTYPE;
  static constexpr FeatureClass kClass = CLASS;
  static constexpr bool kDropout = DROPOUT;
  static constexpr int kHeadDimQk = HEAD_DIM_QK, kHeadDimV = HEAD_DIM_V, kBlockM = BLOCK_M;
  static_assert(BLOCK_M == 32, "a lane has the mask word of one row");
  static_assert(BLOCK_N == 16 * NUM_WARPS && HEAD_DIM_V == HEAD_DIM_QK, "dkey and dvalue go where the warp's rows of V were");

  using KeyTile = SharedTile<16, HEAD_DIM_QK>;  // of a warp, as the next two
  using ValueTile = SharedTile<16, HEAD_DIM_V>;
  using ScoreTile = SharedTile<16, BLOCK_M>;  // dS^T
  using QueryTile = SharedTile<BLOCK_M, HEAD_DIM_QK>;
  using GradientTile = SharedTile<BLOCK_M, HEAD_DIM_V>;  // of dout
  // In this order in shared memory, for each group: K, V, dS^T; `row_tiles_in_flight` times Q, dO, lse and delta; a note of each warp.
  static constexpr int kWarpBytes = KeyTile::kBytes + ValueTile::kBytes + ScoreTile::kBytes;
  static constexpr int kStatisticsBytes = 2 * BLOCK_M * 4;
  static constexpr int kRowTileBytes = QueryTile::kBytes + GradientTile::kBytes + kStatisticsBytes;
  static constexpr int kNotesBytes = 2 * 4 * NUM_WARPS + 64;  // whether a warp has gradients of scores; its part of a slope's gradient
  static constexpr int kSharedBytes = NUM_WARPS * kWarpBytes + STAGES * kRowTileBytes + kNotesBytes;
  static_assert(kNotesBytes % 128 == 0);
};

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

template <class Config>
FA_DEVICE void short_backward(const BackwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kBlockM = Config::kBlockM, kBlocks = kBlockM / 8, kDims = Config::kHeadDimQk;
  constexpr bool kPlain = Config::kClass == FeatureClass::plain, kBias = Config::kClass == FeatureClass::bias;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using ScoreTile = typename Config::ScoreTile;
  using QueryTile = typename Config::QueryTile;
  using GradientTile = typename Config::GradientTile;
  extern __shared__ __align__(128) unsigned char shared[];

  const AttentionProblem& problem = arguments.problem;
  const WarpGroup group(arguments.units);
  if (!group.has_work) return;
  const int lane = threadIdx.x % 32, warp = group.warp, num_warps = group.num_warps;
  const int tiles_in_flight = arguments.units.row_tiles_in_flight;
  unsigned char* const keys_at = shared + group.number * arguments.units.shared_bytes;  // warps x (16, HEAD_DIM_QK)
  unsigned char* const values_at = keys_at + num_warps * KeyTile::kBytes;               // warps x (16, HEAD_DIM_V)
  unsigned char* const scores_at = values_at + num_warps * ValueTile::kBytes;           // warps x (16, BLOCK_M)
  unsigned char* const rows_at = scores_at + num_warps * ScoreTile::kBytes;             // Q, dO, lse, delta of BLOCK_M rows; and again
  auto* const has_gradients = reinterpret_cast<int*>(rows_at + tiles_in_flight * Config::kRowTileBytes);  // (warps,)
  auto* const slope_parts = reinterpret_cast<float*>(has_gradients + num_warps);                          // (warps,)
  const uint32_t k_smem = ptx::shared_address(keys_at), v_smem = ptx::shared_address(values_at), rows_smem = ptx::shared_address(rows_at);
  const auto statistics_of_tile = [&](int slot) {
    return reinterpret_cast<float*>(rows_at + slot * Config::kRowTileBytes + QueryTile::kBytes + GradientTile::kBytes);
  };

  const KeysOfWarp of_warp(problem, group);
  const int batch = of_warp.batch, key_head = of_warp.key_head, first_key = of_warp.first_key;
  const Sequence& sequence = of_warp.sequence;
  const int first_head = key_head * arguments.heads_per_group, keys_word = first_key / kKeysPerWord * kKeysPerWord;
  const uint32_t word =
      kPlain ? bits_of({0, sequence.keys_present}, keys_word) : existing_keys(problem, batch, sequence.keys_present, keys_word);
  const uint32_t existing = sequence.rows_present > 0 ? word >> first_key % kKeysPerWord & 0xffff : 0;  // of this warp's keys
  const auto exists = [&](int row) { return (existing >> row & 1) != 0; };
  copy_rows_async<KeyTile, 32>(k_smem + warp * KeyTile::kBytes, of_warp.rows_of(problem.key), problem.key.row,
                               static_cast<int>(problem.head_dim_qk), lane, exists);
  copy_rows_async<ValueTile, 32>(v_smem + warp * ValueTile::kBytes, of_warp.rows_of(problem.value), problem.value.row,
                                 static_cast<int>(problem.head_dim_v), lane, exists);
  ptx::cp_async_commit();

  // A step is a tile of rows of one head.
  const int row_tiles = (sequence.rows_present + kBlockM - 1) / kBlockM, num_steps = row_tiles * arguments.heads_per_group;
  const auto head_of_step = [&](int step) {
    return first_head + static_cast<int>(static_cast<uint32_t>(step) / static_cast<uint32_t>(row_tiles));
  };
  const auto start_of_step = [&](int step) {
    return static_cast<int>(static_cast<uint32_t>(step) % static_cast<uint32_t>(row_tiles)) * kBlockM;
  };

  // Loads of steps, those that there are, by all warps of the group: 8 rows of Q in turn, and of dO as many as a warp's lanes hold at once.
  const auto load_steps = [&](int first_step, int count, int first_slot, auto unroll) {
    count = min(count, num_steps - first_step);
    using Piece = SharedTile<8, kDims>;
#pragma unroll 1
    for (int piece = warp; piece < kBlockM / 8 * count; piece += num_warps) {
      const int of_step = piece / (kBlockM / 8), row_in_tile = piece % (kBlockM / 8) * 8, step = first_step + of_step;
      const int first_row = start_of_step(step) + row_in_tile;
      const uint16_t* const query =
          head_of(problem.query, batch, head_of_step(step)) + (sequence.first_row + first_row) * problem.query.row;
      copy_rows_async<Piece, 32>(rows_smem + (first_slot + of_step) * Config::kRowTileBytes + row_in_tile * QueryTile::kPitch, query,
                                 problem.query.row, static_cast<int>(problem.head_dim_qk), lane,
                                 [&](int row) { return first_row + row < sequence.rows_present; });
    }
    ptx::cp_async_commit();
    constexpr int kLanes = GradientTile::kPermuted, kRowsAtOnce = 32 / kLanes, kChunks = Config::kHeadDimV / (kLanes * kChunk);
    constexpr int kUnroll = decltype(unroll)::value;
#pragma unroll(kUnroll)
    for (int item = warp * kRowsAtOnce + lane / kLanes; item < kBlockM * count; item += num_warps * kRowsAtOnce) {
      const int of_step = item / kBlockM, row_in_tile = item % kBlockM, slot = first_slot + of_step, step = first_step + of_step;
      const int head = head_of_step(step), row = start_of_step(step) + row_in_tile;
      const bool present = row < sequence.rows_present;
      const int64_t place = statistics_of(problem, sequence, batch, head) + row;
      const float row_lse = present ? problem.lse[place] : -kInfinity;
      const bool attends = row_lse != -kInfinity;  // else its dO may be anything
      const uint16_t* const out = head_of(problem.out, batch, head) + (sequence.first_row + row) * problem.out.row;
      const uint16_t* const dout = head_of(problem.dout, batch, head) + (sequence.first_row + row) * problem.dout.row;
      unsigned char* const dout_tile = rows_at + slot * Config::kRowTileBytes + QueryTile::kBytes;
      float* const statistics = statistics_of_tile(slot);
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
        *reinterpret_cast<uint4*>(dout_tile + GradientTile::offset(row_in_tile, chunk)) = right;
        sum = add_dot<kDtype>(sum, left, right);
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, distance);
      if (lane % kLanes == 0) {
        if (attends && problem.dlse != nullptr) sum -= problem.dlse[place];
        statistics[row_in_tile] = attends ? row_lse * kLog2E : kInfinity;
        statistics[kBlockM + row_in_tile] = attends ? sum : 0.0f;
      }
    }
  };
  load_steps(0, tiles_in_flight, 0, std::integral_constant<int, 2>());

  const auto k_lane = LaneAddress<KeyTile>::by_rows(k_smem + warp * KeyTile::kBytes);
  const auto v_lane = LaneAddress<ValueTile>::by_rows(v_smem + warp * ValueTile::kBytes);
  const bool drops = kPlain ? Config::kDropout : problem.dropout_threshold != 0;
  const bool stores_mask_gradient = kBias && arguments.dattn_mask.data != nullptr;
  Accumulators<1, kDims / 8> dkey = {};
  Accumulators<1, kDims / 8> dvalue = {};
  [[maybe_unused]] float column_sum[2] = {}, slope_sum = 0.0f;  // of one head

  int head = first_head, start_m = 0, slot = 0;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    ptx::cp_async_wait<0>();  // these rows have landed, K and V before them; the groups behind them had a product to arrive in
    group.sync();
    const ScoreMask mask{sequence, problem, batch, head};
    const uint32_t q_smem = rows_smem + slot * Config::kRowTileBytes, do_smem = q_smem + QueryTile::kBytes;
    const float *const lse = statistics_of_tile(slot), *const delta = lse + kBlockM;
    const auto column = [&](int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; };
    const bool last_of_head = start_m + kBlockM >= sequence.rows_present;

    // Bit b: whether this lane's row may attend to key first_key + b.
    const uint32_t allowed =
        existing == 0 ? 0 : allowed_keys<kPlain>(mask, start_m + lane, keys_word, word) >> first_key % kKeysPerWord & 0xffff;
    const bool visits = __any_sync(kWholeWarp, allowed != 0);
    if (visits) {
      // S^T = K Q^T (16, BLOCK_M)
      Accumulators<1, kBlocks> scores, gradients;
      [[maybe_unused]] Accumulators<1, kBlocks> slopes;
      multiply_transposed<kDtype, kDims / 16>(
          scores, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, k_lane.at(0, i)); }, LaneAddress<QueryTile>::by_columns(q_smem));

      // P^T
      float scale = arguments.score_scale;
      if constexpr (!kPlain) {
        const ScoreTransform transform(arguments, batch, head);
        scale = cap_with_slopes(transform, scores, slopes);
        if constexpr (kBias) {
          Bias<1, kBlocks, true> bias(problem, batch, head);
          bias.load(first_key, static_cast<int>(problem.seqlen_k) - 1, start_m);
          bias.add_to(scores, scale);
          scale = 1.0f;
        }
        scale = transform.add_slopes(scores, scale, -sequence.offset, first_key, start_m);
      }
      if (!__all_sync(kWholeWarp, allowed == 0xffff)) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint32_t of_row = __shfl_sync(kWholeWarp, allowed, column(n, e)) >> lane / 4;
            if ((of_row & 1) == 0) scores[0][n][e] = -kInfinity;
            if ((of_row >> 8 & 1) == 0) scores[0][n][e + 2] = -kInfinity;
          }
        }
      }
      scores_to_weights<kBias>(scores, scale, [&](int, int n, int e) { return lse[column(n, e)]; });
      if (drops) Dropout(problem, batch, head).mark_transposed(scores, first_key, start_m);

      // dP^T = V dO^T (16, BLOCK_M), and with it dS^T; late, so that what made P^T needs no registers any more
      multiply_transposed<kDtype, kDims / 16>(
          gradients, [&](int i, int, uint32_t (&a)[4]) { ptx::ldmatrix_x4(a, v_lane.at(0, i)); },
          LaneAddress<GradientTile>::by_columns(do_smem));
      weights_to_score_gradients<true>(gradients, scores, drops, arguments.kept_scale,
                                       [&](int, int n, int e) { return delta[column(n, e)]; });
      if constexpr (kBias) {
        if (stores_mask_gradient) store_mask_gradient_transposed(arguments, gradients, batch, head, first_key, start_m);
        if (arguments.column_sums != nullptr) {
          for_each_element(gradients, [&](float& gradient, int row, int) { column_sum[row / 8] += gradient; });
        }
      }
      if constexpr (!kPlain) {
        if (arguments.slope_sums != nullptr) {
          const int diagonal = first_key - sequence.offset - start_m;
          for_each_element(
              gradients, [&](float& gradient, int key, int row) { slope_sum -= gradient * static_cast<float>(abs(row - key - diagonal)); });
        }
        if (arguments.softcap_log2 != 0.0f) {
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) gradients[0][n][e] *= slopes[0][n][e];
          }
        }
      }

      // dS^T for the others (16, BLOCK_M)
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(scores_at + warp * ScoreTile::kBytes + ScoreTile::offset(8 * half + lane / 4, n) + 4 * (lane % 4)) =
              ptx::pack<kDtype>(gradients[0][n][2 * half], gradients[0][n][2 * half + 1]);
        }
      }

      // dV += P^T dO (16, HEAD_DIM_V) and dK += dS^T Q (16, HEAD_DIM_QK)
      multiply_add<kDtype>(dvalue, scores, LaneAddress<GradientTile>::by_rows(do_smem));
      multiply_add<kDtype>(dkey, gradients, LaneAddress<QueryTile>::by_rows(q_smem));
    } else if (stores_mask_gradient) {
      const Accumulators<1, kBlocks> none = {};
      store_mask_gradient_transposed(arguments, none, batch, head, first_key, start_m);
    }
    if constexpr (!kPlain) {
      if (arguments.slope_sums != nullptr && last_of_head) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) slope_sum += __shfl_xor_sync(kWholeWarp, slope_sum, distance);
        if (lane == 0) slope_parts[warp] = slope_sum;
        slope_sum = 0.0f;
      }
    }
    if constexpr (kBias) {
      if (arguments.column_sums != nullptr && last_of_head) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = first_key + 8 * half + lane / 4;
          const float sum = quad_sum(column_sum[half]);
          if (lane % 4 == 0 && key < of_warp.keys) arguments.column_sums[(batch * problem.num_heads + head) * problem.seqlen_k + key] = sum;
          column_sum[half] = 0.0f;
        }
      }
    }
    if (lane == 0) has_gradients[warp] = visits;
    group.sync();  // dS is complete, and every warp is past its products with these rows
    load_steps(step + tiles_in_flight, 1, slot, std::integral_constant<int, kDims <= 64 ? 2 : 1>());

    // dQ = scale * dS K (BLOCK_M, HEAD_DIM_QK), pieces of 16 x 32 to a warp.
    const int rows_left = sequence.rows - start_m, rows_present_left = sequence.rows_present - start_m;
    uint16_t* const dquery = head_of(problem.dquery, batch, head) + (sequence.first_row + start_m) * problem.dquery.row;
    const auto ds_lane = LaneAddress<ScoreTile>::by_columns(ptx::shared_address(scores_at));  // transposed: rows of dS are its columns
    const auto k_rows = LaneAddress<KeyTile>::by_rows(k_smem);
#pragma unroll 1
    for (int piece = warp; piece < kBlockM / 16 * (kDims / 32); piece += num_warps) {
      const int upper_rows = piece % (kBlockM / 16), columns = piece / (kBlockM / 16);  // in sixteens, in thirty-twos
      if (16 * upper_rows >= rows_left) continue;
      Accumulators<1, 4> acc = {};
#pragma unroll 2
      for (int from = 0; from < num_warps; ++from) {
        if (has_gradients[from] == 0) continue;
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, ds_lane.at(16 * from, upper_rows));
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, k_rows.at(16 * from, 2 * columns + n / 2));
          ptx::mma_m16n8k16<kDtype>(acc[0][n], a, b[0], b[1], acc[0][n]);
          ptx::mma_m16n8k16<kDtype>(acc[0][n + 1], a, b[2], b[3], acc[0][n + 1]);
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
    if constexpr (!kPlain) {
      if (arguments.slope_sums != nullptr && last_of_head && warp == 0 && lane == 0) {
        float sum = 0.0f;
        for (int from = 0; from < num_warps; ++from) sum += slope_parts[from];
        const int64_t parts = (problem.seqlen_q + kRowsPerSlopePart - 1) / kRowsPerSlopePart;
        arguments.slope_sums[(batch * problem.num_heads + head) * parts] = sum;
      }
    }
    slot = slot + 1 == tiles_in_flight ? 0 : slot + 1;
    start_m += kBlockM;
    if (last_of_head) start_m = 0, ++head;
  }
  ptx::cp_async_wait<0>();  // of a warp's own V, which its gradients overwrite

  // Where a warp works is found anew, so that the loop above need not remember it.
  const WarpGroup done(arguments.units, ptx::again(threadIdx.x));
  const KeysOfWarp keys(problem, done);
  const int keys_left = keys.keys - keys.first_key;
  unsigned char* const tile = shared + done.number * arguments.units.shared_bytes + done.num_warps * KeyTile::kBytes +
                              done.warp * ValueTile::kBytes;  // the warp's rows of V, which it has read
  __syncwarp();
  store_rows<kDtype, ValueTile>(dvalue, arguments.kept_scale, tile, 0, keys_left, keys.rows_of(problem.dvalue), problem.dvalue.row,
                                static_cast<int>(problem.head_dim_v));
  __syncwarp();
  store_rows<kDtype, ValueTile>(dkey, problem.softmax_scale, tile, 0, keys_left, keys.rows_of(problem.dkey), problem.dkey.row,
                                static_cast<int>(problem.head_dim_qk));

  // Rows of no tile: gradients of query and of the mask are 0.
  const int first_absent = (keys.sequence.rows_present + kBlockM - 1) / kBlockM * kBlockM;
  for (int row_head = keys.key_head * arguments.heads_per_group; row_head < (keys.key_head + 1) * arguments.heads_per_group; ++row_head) {
    uint16_t* const dquery = head_of(problem.dquery, keys.batch, row_head) + keys.sequence.first_row * problem.dquery.row;
    for (int row = first_absent + done.warp; row < keys.sequence.rows; row += done.num_warps) {
      for (int column = lane * kChunk; column < problem.head_dim_qk; column += 32 * kChunk) {
        *reinterpret_cast<uint4*>(dquery + row * problem.dquery.row + column) = uint4{};
      }
    }
    if (stores_mask_gradient) {
      const Accumulators<1, kBlocks> none = {};
      for (int start = first_absent; start < keys.sequence.rows; start += kBlockM) {
        store_mask_gradient_transposed(arguments, none, keys.batch, row_head, keys.first_key, start);
      }
    }
  }
}

}  // namespace fused_attention::cuda::sm80
