// SPDX-License-Identifier: Apache-2.0
// The forward kernel for compute capability 8.0 and newer: a block computes BLOCK_M rows of one head against all the keys that they see.
//
// Method: FlashAttention-2 (Dao, arXiv 2307.08691) on mma.sync.
//   1. visit the key blocks of which every score counts, in a loop without masks, then those of which some do; never the others
//   2. K and V come in STAGES blocks ahead each by cp.async, absent keys as zeros
//   3. scores = Q K^T, softcap, bias and ALiBi where asked for, masks in mixed blocks
//   4. online softmax, dropout, out += P V, P in registers
//   5. out / row_sum through shared memory; lse
// A sink is a first key with score `sink` and no value.
#pragma once
#include "../dropout.cuh"
#include "../row_block.cuh"
#include "../scores.cuh"

namespace fused_attention::cuda::sm80 {

template <class Row>
struct ForwardConfig : Row {
  static constexpr int kRowsPerWarp = Row::kBlockM / Row::kWarps, kMatrices = kRowsPerWarp / 16;
  static_assert(kRowsPerWarp % 16 == 0 && kKeysPerTile % Row::kBlockN == 0 && Row::kBlockN % 32 == 0);
  static_assert(Row::kHeadDimV <= Row::kHeadDimQk, "out goes where Q was");
  static constexpr bool kQueryInRegisters = kMatrices * Row::kHeadDimQk <= (Row::kClass == FeatureClass::masked ? 64 : 128);

  using QueryTile = SharedTile<Row::kBlockM, Row::kHeadDimQk>;
  using KeyTile = SharedTile<Row::kBlockN, Row::kHeadDimQk>;
  using ValueTile = SharedTile<Row::kBlockN, Row::kHeadDimV>;
  struct SharedMemory {
    typename QueryTile::Memory q;  // at the end out
    typename KeyTile::Memory k[Row::kStages];
    typename ValueTile::Memory v[Row::kStages];
  };
};

template <class Config>
FA_DEVICE void forward(const ForwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kMatrices = Config::kMatrices, kStages = Config::kStages, kBlockN = Config::kBlockN;
  constexpr int kSteps = Config::kHeadDimQk / 16, kScoreBlocks = kBlockN / 8, kOutBlocks = Config::kHeadDimV / 8;
  constexpr bool kPlain = Config::kPlain, kBias = Config::kBias;
  using QueryTile = typename Config::QueryTile;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  using SharedMemory = typename Config::SharedMemory;
  auto& shared = shared_memory<Config>();
  const uint32_t smem = ptx::shared_address(&shared);
  const uint32_t q_smem = smem + offsetof(SharedMemory, q);  // (BLOCK_M, HEAD_DIM_QK)
  const uint32_t k_smem = smem + offsetof(SharedMemory, k);  // STAGES x (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = smem + offsetof(SharedMemory, v);  // STAGES x (BLOCK_N, HEAD_DIM_V)

  const AttentionProblem& problem = arguments.problem;
  const RowBlock<Config::kBlockM> block(problem, blockIdx.x);
  const Sequence& sequence = block.sequence;
  if (block.start_m >= sequence.rows) return;
  const int key_head = block.head / arguments.heads_per_group;
  const uint16_t* const key = block.keys_of(problem.key, key_head);      // (Lk, Dqk)
  const uint16_t* const value = block.keys_of(problem.value, key_head);  // (Lk, Dv)
  const auto blocks = key_blocks<Config::kBlockM, kBlockN, !kPlain>(sequence, arguments.tiles, block.batch, block.head, block.start_m);
  const ScoreMask mask{sequence, problem, block.batch, block.head};
  const int warp_row = threadIdx.x / 32 * Config::kRowsPerWarp;  // the first one of this warp

  // Loads: every call is one group of cp.async, an empty one past the last block.
  const auto load_keys = [&](int step, const uint16_t* tensor, int64_t stride, int columns, uint32_t smem, auto tile) {
    using Tile = decltype(tile);
    const uint32_t thread = ptx::again(threadIdx.x);
    if (step < blocks.num_blocks) {
      const int start_n = blocks.start(step);
      const uint16_t* const source = tensor + start_n * stride;
      const uint32_t target = smem + step % kStages * Tile::kBytes;
      if (kPlain || step < blocks.num_full || problem.key_mask == nullptr) {
        const int keys_left = sequence.keys_present - start_n;
        copy_rows_async<Tile, Config::kThreads>(target, source, stride, columns, thread, [&](int row) { return row < keys_left; });
      } else {
        copy_rows_async<Tile, Config::kThreads>(target, source, stride, columns, thread,
                                                [&](int row) { return mask.key_exists(start_n + row); });
      }
    }
    ptx::cp_async_commit();
  };
  const auto load_k = [&](int step) { load_keys(step, key, problem.key.row, static_cast<int>(problem.head_dim_qk), k_smem, KeyTile()); };
  const auto load_v = [&](int step) {
    load_keys(step, value, problem.value.row, static_cast<int>(problem.head_dim_v), v_smem, ValueTile());
  };
  copy_rows_async<QueryTile, Config::kThreads>(q_smem, block.rows_of(problem.query), problem.query.row,
                                               static_cast<int>(problem.head_dim_qk), threadIdx.x,
                                               [&](int row) { return block.start_m + row < sequence.rows_present; });
  load_k(0);
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    load_v(stage - 1);
    load_k(stage);
  }

  const auto q_lane = LaneAddress<QueryTile>::by_rows(q_smem, warp_row);
  const auto k_lane = LaneAddress<KeyTile>::by_columns(k_smem);
  const auto v_lane = LaneAddress<ValueTile>::by_rows(v_smem);
  uint32_t q[Config::kQueryInRegisters ? kSteps : 1][kMatrices][4];
  Accumulators<kMatrices, kOutBlocks> acc = {};
  const bool has_sink = !kPlain && problem.sinks != nullptr;
  OnlineSoftmax<kMatrices> softmax([&](int, int) { return has_sink ? problem.sinks[block.head] * kLog2E : -kInfinity; });
  Dropout dropout;
  if constexpr (Config::kDropout) dropout = Dropout(problem, block.batch, block.head);

  const auto step_over = [&](int step, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int start_n = kMasked || !kPlain || Config::kDropout ? blocks.start(step) : 0;
    const int first_row = block.start_m + warp_row;

    // K of this block has landed, and every warp is past the product with V of the last one.
    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();
    load_v(step + kStages - 1);
    if constexpr (Config::kQueryInRegisters) {
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
    if constexpr (kBias) bias.load(first_row, sequence.rows_present - 1, start_n);
    LaneAddress<KeyTile> k_here = k_lane;
    k_here.first += step % kStages * KeyTile::kBytes;
    multiply_transposed<kDtype, kSteps>(
        scores,
        [&](int i, int m, uint32_t (&a)[4]) {
          if constexpr (Config::kQueryInRegisters) {
#pragma unroll
            for (int word = 0; word < 4; ++word) a[word] = q[i][m][word];
          } else {
            ptx::ldmatrix_x4(a, q_lane.at(16 * m, i));
          }
        },
        k_here);

    // V of this block has landed, and every warp is past the product with its K.
    ptx::cp_async_wait<2 * kStages - 2>();
    __syncthreads();
    load_k(step + kStages);

    // P = softmax(S)
    float scale = arguments.score_scale;
    [[maybe_unused]] const ScoreTransform transform(arguments, block.batch, block.head);
    if constexpr (!kPlain) scale = transform.cap(scores);
    if constexpr (kBias) {
      bias.add_to(scores, scale);
      scale = 1.0f;
    }
    if constexpr (!kPlain) scale = transform.add_alibi(scores, scale, sequence.offset, first_row, start_n);
    if constexpr (kMasked) {
      mask.apply<kPlain>(
          scores, [&](int m, int half) { return first_row + 16 * m + 8 * half + static_cast<int>(threadIdx.x % 32 / 4); }, start_n);
    }
    softmax.template update<kMasked || kBias>(scores, scale, acc);
    if constexpr (Config::kDropout) {
      dropout.apply(scores, first_row, start_n);
    } else if (!kPlain && problem.dropout_threshold != 0) {  // no registers are kept for it
      Dropout(problem, block.batch, block.head).apply(scores, first_row, start_n);
    }

    // O += P V (BLOCK_M, HEAD_DIM_V)
    LaneAddress<ValueTile> v_here = v_lane;
    v_here.first += step % kStages * ValueTile::kBytes;
    multiply_add<kDtype>(acc, scores, v_here);
  };
  blocks.for_each(step_over);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q has landed and was read: a warp's rows of it may lie in what another warp copied

  // out = O / row_sum. Where a block and a thread work is found anew, so that the loops above need not remember it.
  const RowBlock<Config::kBlockM> done(problem, ptx::again(blockIdx.x));
  const int thread = static_cast<int>(ptx::again(threadIdx.x)), lane = thread % 32, first_row = thread / 32 * Config::kRowsPerWarp;
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
  for (int i = 0; i < Config::kRowsPerWarp * kLanes / 32; ++i) {
    const int row = first_row + i * (32 / kLanes) + lane / kLanes;
#pragma unroll
    for (int j = 0; j < Config::kHeadDimV / kChunk / kLanes; ++j) {
      const int chunk = lane % kLanes + j * kLanes;
      if (row < rows && chunk * kChunk < problem.head_dim_v) {
        *reinterpret_cast<uint4*>(out + row * problem.out.row + chunk * kChunk) =
            *reinterpret_cast<const uint4*>(shared.q.bytes + QueryTile::offset(row, chunk));
      }
    }
  }
}

}  // namespace fused_attention::cuda::sm80
