// SPDX-License-Identifier: Apache-2.0
// The forward kernel for compute capability 8.0 and newer: a block computes BLOCK_M rows of one head against all the keys that they see.
//
// Method: FlashAttention-2 (Dao, arXiv 2307.08691) on mma.sync.
//   1. visit the key blocks in which every score counts, in a loop without masks, then those in which some do; skip the others
//   2. cp.async copies K and V up to STAGES blocks ahead, absent keys as zeros
//   3. scores = Q K^T; softcap, bias and ALiBi if asked for; masks in mixed blocks
//   4. online softmax, dropout, out += P V, with P in registers
//   5. out / row_sum through shared memory; lse
// A sink is a first key with score `sink` and no value.
#pragma once
#include "../dropout.cuh"
#include "../row.cuh"
#include "../row_block.cuh"
#include "../scores.cuh"

namespace fused_attention::cuda::sm80 {

struct Forward : Row {
  static constexpr int kRowsPerWarp = kBlockM / kWarps, kMatrices = kRowsPerWarp / 16;
  static constexpr int kSteps = kHeadDimQk / 16, kScoreBlocks = kBlockN / 8, kOutBlocks = kHeadDimV / 8;
  static constexpr bool kQueryInRegisters = kMatrices * kHeadDimQk <= (kClass == FeatureClass::masked ? 64 : 128);
  static_assert(kRowsPerWarp % 16 == 0 && kKeysPerTile % kBlockN == 0 && kBlockN % 32 == 0);
  static_assert(kHeadDimV <= kHeadDimQk, "out goes where Q was");

  using QueryTile = SharedTile<kBlockM, kHeadDimQk>;
  using KeyTile = SharedTile<kBlockN, kHeadDimQk>;
  using ValueTile = SharedTile<kBlockN, kHeadDimV>;
  struct SharedMemory {
    QueryTile q;  // at the end out
    KeyTile k[kStages];
    ValueTile v[kStages];
  };

  static FA_DEVICE void run(const ForwardArguments& arguments);
};

FA_DEVICE void Forward::run(const ForwardArguments& arguments) {
  auto& shared = shared_memory<Forward>();
  const AttentionProblem& problem = arguments.problem;
  const RowBlock<kBlockM> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  if (block.start_m >= sequence.rows) return;
  const int key_head = block.head / arguments.heads_per_group;
  const uint16_t* const key = block.keys_of(problem.key, key_head);      // (Lk, Dqk)
  const uint16_t* const value = block.keys_of(problem.value, key_head);  // (Lk, Dv)
  const auto blocks = key_blocks<kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, block.batch, block.head, block.start_m);
  const ScoreMask mask{sequence, problem, block.batch, block.head};
  const int warp_row = threadIdx.x / 32 * kRowsPerWarp;  // the first one of this warp

  // Loads: every call is one group of cp.async, an empty one past the last block.
  const auto load_keys = [&](int step, const uint16_t* tensor, int64_t stride, int columns, auto& tiles) {
    const uint32_t thread = ptx::again(threadIdx.x);
    if (step < blocks.num_blocks) {
      const int start_n = blocks.start(step);
      const uint16_t* const source = tensor + start_n * stride;
      auto& tile = tiles[step % kStages];
      if (kPlain || step < blocks.num_full || problem.key_mask == nullptr) {
        const int keys_left = sequence.keys_present - start_n;
        copy_rows_async<kThreads>(tile, source, stride, columns, thread, [&](int row) { return row < keys_left; });
      } else {
        copy_rows_async<kThreads>(tile, source, stride, columns, thread, [&](int row) { return mask.key_exists(start_n + row); });
      }
    }
    ptx::cp_async_commit();
  };
  const auto load_k = [&](int step) { load_keys(step, key, problem.key.row, static_cast<int>(problem.head_dim_qk), shared.k); };
  const auto load_v = [&](int step) { load_keys(step, value, problem.value.row, static_cast<int>(problem.head_dim_v), shared.v); };
  copy_rows_async<kThreads>(shared.q, block.rows_of(problem.query), problem.query.row, static_cast<int>(problem.head_dim_qk), threadIdx.x,
                            [&](int row) { return block.start_m + row < sequence.rows_present; });
  load_k(0);
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    load_v(stage - 1);
    load_k(stage);
  }

  const auto q_lane = shared.q.by_rows(warp_row);
  const auto k_lane = shared.k[0].by_columns();
  const auto v_lane = shared.v[0].by_rows();
  uint32_t q[kQueryInRegisters ? kSteps : 1][kMatrices][4];
  Accumulators<kMatrices, kOutBlocks> acc = {};
  const bool has_sink = !kPlain && problem.sinks != nullptr;
  OnlineSoftmax<kMatrices> softmax([&](int, int) { return has_sink ? problem.sinks[block.head] * kLog2E : -kInfinity; });
  Dropout dropout;
  if constexpr (kDropout) dropout = Dropout(problem, block.batch, block.head);

  const auto step_over = [&](int step, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int start_n = kMasked || !kPlain || kDropout ? blocks.start(step) : 0;
    const int first_row = block.start_m + warp_row;

    // K of this block has landed, and every warp is done with V of the last one.
    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();
    load_v(step + kStages - 1);
    if constexpr (kQueryInRegisters) {
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) ptx::ldmatrix_x4(q[i][m], q_lane.at(16 * m, i));
        }
      }
    }

    // S = Q K^T (BLOCK_M, BLOCK_N), each warp its own rows.
    Accumulators<kMatrices, kScoreBlocks> scores;
    [[maybe_unused]] std::conditional_t<kBias, Bias<kMatrices, kScoreBlocks>, NoBias> bias(problem, block.batch, block.head);
    bias.load(first_row, sequence.rows_present - 1, start_n);
    multiply_transposed<kDtype>(
        scores,
        [&](int i, int m, uint32_t (&a)[4]) {
          if constexpr (kQueryInRegisters) {
#pragma unroll
            for (int word = 0; word < 4; ++word) a[word] = q[i][m][word];
          } else {
            q_lane(i, m, a);
          }
        },
        k_lane[step % kStages]);

    // V of this block has landed, and every warp is done with its K.
    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();
    load_k(step + kStages);

    // P = softmax(S)
    float scale = arguments.score_scale;
    [[maybe_unused]] const ScoreTransform transform(arguments, block.batch, block.head);
    if constexpr (!kPlain) scale = transform.cap(scores);
    scale = bias.add_to(scores, scale);
    if constexpr (!kPlain) scale = transform.add_alibi(scores, scale, sequence.offset, first_row, start_n);
    if constexpr (kMasked) {
      mask.apply<kPlain>(
          scores, [&](int m, int half) { return first_row + 16 * m + 8 * half + static_cast<int>(threadIdx.x % 32 / 4); }, start_n);
    }
    softmax.template update<kMasked || kBias>(scores, scale, acc);
    if constexpr (kDropout) {
      dropout.apply(scores, first_row, start_n);
    } else if (!kPlain && problem.dropout_threshold != 0) {  // made here, so that it takes no registers
      Dropout(problem, block.batch, block.head).apply(scores, first_row, start_n);
    }

    // O += P V (BLOCK_M, HEAD_DIM_V)
    multiply_add<kDtype>(acc, scores, v_lane[step % kStages]);
  };
  blocks.for_each(step_over);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q has landed and was read, also the rows of this warp that others copied

  // out = O / row_sum. Positions are recomputed, so that they take no registers in the loops above.
  const RowBlock<kBlockM> done(problem, ptx::again(blockIdx.x));
  const int thread = static_cast<int>(ptx::again(threadIdx.x)), lane = thread % 32, first_row = thread / 32 * kRowsPerWarp;
  const int rows = done.sequence.rows - done.start_m, rows_present = done.sequence.rows_present - done.start_m;  // of this block
  float* const lse = problem.lse + done.statistics(problem);                                                     // (rows,)
  uint16_t* const out = done.rows_of(problem.out);                                                               // (rows, Dv)
  softmax.sum_over_quads();
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + lane / 4;
      const bool present = row < rows_present;
      const float factor = present ? softmax.reciprocal_sum(m, half) * arguments.kept_scale : 0.0f;
      unsigned char* const row_smem = shared.q.bytes + row * QueryTile::kPitch + 4 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        const uint32_t pair = ptx::pack<kDtype>(acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor);
        *reinterpret_cast<uint32_t*>(row_smem + QueryTile::offset_in_row(row, n)) = present ? pair : 0;
      }
      if (lane % 4 == 0 && row < rows) lse[row] = present ? softmax.lse(m, half) : -kInfinity;
    }
  }
  __syncwarp();
  constexpr int kLanes = ValueTile::kPermuted;
#pragma unroll
  for (int i = 0; i < kRowsPerWarp * kLanes / 32; ++i) {
    const int row = first_row + i * (32 / kLanes) + lane / kLanes;
#pragma unroll
    for (int j = 0; j < kHeadDimV / kChunk / kLanes; ++j) {
      const int chunk = lane % kLanes + j * kLanes;
      if (row < rows && chunk * kChunk < problem.head_dim_v) {
        *reinterpret_cast<uint4*>(out + row * problem.out.row + chunk * kChunk) =
            *reinterpret_cast<const uint4*>(shared.q.bytes + QueryTile::offset(row, chunk));
      }
    }
  }
}

}  // namespace fused_attention::cuda::sm80
