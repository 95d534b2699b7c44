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
#include "../scores.cuh"

namespace fused_attention::cuda::sm80 {

template <Dtype DTYPE, int HEAD_DIM_QK, int HEAD_DIM_V, FeatureClass CLASS, bool DROPOUT, int BLOCK_M, int BLOCK_N, int NUM_WARPS,
          int STAGES>
struct ForwardConfig {
  static constexpr Dtype kDtype = DTYPE;
  static constexpr FeatureClass kClass = CLASS;
  static constexpr bool kDropout = DROPOUT;
  static constexpr int kHeadDimQk = HEAD_DIM_QK, kHeadDimV = HEAD_DIM_V, kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = STAGES;
  static constexpr int kThreads = 32 * NUM_WARPS, kRowsPerWarp = BLOCK_M / NUM_WARPS, kMatrices = kRowsPerWarp / 16;
  static_assert(kRowsPerWarp % 16 == 0 && kKeysPerTile % BLOCK_N == 0 && BLOCK_N % 32 == 0);
  static_assert(HEAD_DIM_V <= HEAD_DIM_QK, "out goes where Q was");

  using QueryTile = SharedTile<BLOCK_M, HEAD_DIM_QK>;
  using KeyTile = SharedTile<BLOCK_N, HEAD_DIM_QK>;
  using ValueTile = SharedTile<BLOCK_N, HEAD_DIM_V>;
  static constexpr int kSharedBytes = QueryTile::kBytes + STAGES * (KeyTile::kBytes + ValueTile::kBytes);
  static constexpr bool kQueryInRegisters = kMatrices * HEAD_DIM_QK <= 128;
};

// Where a block works.
struct Place {
  int64_t batch, head;
  int start_m;

  FA_DEVICE Place(const AttentionProblem& problem, int block_m) {
    const auto row_blocks = static_cast<uint32_t>((problem.seqlen_q + block_m - 1) / block_m);
    const auto num_heads = static_cast<uint32_t>(problem.num_heads);
    const uint32_t line = blockIdx.x / row_blocks;
    start_m = static_cast<int>(row_blocks - 1 - blockIdx.x % row_blocks) * block_m;  // the longest causal rows first
    head = line % num_heads;
    batch = line / num_heads;
  }
};

template <class Config>
FA_DEVICE void forward(const ForwardArguments& arguments) {
  constexpr Dtype kDtype = Config::kDtype;
  constexpr int kMatrices = Config::kMatrices, kStages = Config::kStages, kBlockN = Config::kBlockN;
  constexpr int kSteps = Config::kHeadDimQk / 16, kScoreBlocks = kBlockN / 8, kOutBlocks = Config::kHeadDimV / 8;
  constexpr bool kPlain = Config::kClass == FeatureClass::plain, kBias = Config::kClass == FeatureClass::bias;
  using QueryTile = typename Config::QueryTile;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_smem = ptx::shared_address(shared);         // (BLOCK_M, HEAD_DIM_QK)
  const uint32_t k_smem = q_smem + QueryTile::kBytes;          // STAGES x (BLOCK_N, HEAD_DIM_QK)
  const uint32_t v_smem = k_smem + kStages * KeyTile::kBytes;  // STAGES x (BLOCK_N, HEAD_DIM_V)

  const AttentionProblem& problem = arguments.problem;
  const Place place(problem, Config::kBlockM);
  const Sequence sequence(problem, place.batch);
  if (place.start_m >= sequence.rows) return;
  const int64_t key_head = place.head / arguments.heads_per_group;
  const auto head_of = [&](const StridedTensor& tensor, int64_t head, int64_t row) {
    return static_cast<uint16_t*>(tensor.data) + place.batch * tensor.batch + head * tensor.head + row * tensor.row;
  };
  const uint16_t* const query = head_of(problem.query, place.head, sequence.first_row + place.start_m);  // (Lq - start_m, Dqk)
  const uint16_t* const key = head_of(problem.key, key_head, sequence.first_key);                        // (Lk, Dqk)
  const uint16_t* const value = head_of(problem.value, key_head, sequence.first_key);                    // (Lk, Dv)
  uint16_t* const out = head_of(problem.out, place.head, sequence.first_row + place.start_m);            // (Lq - start_m, Dv)
  const int64_t lse_rows = problem.cu_seqlens_q == nullptr ? problem.seqlen_q : problem.num_tokens_q;
  const int64_t lse_line = problem.cu_seqlens_q == nullptr ? place.batch * problem.num_heads + place.head : place.head;
  float* const lse = problem.lse + lse_line * lse_rows + sequence.first_row + place.start_m;  // (Lq - start_m,)

  const int32_t* const tiles = of_head(arguments.tiles.data, arguments.tiles.batch, place.batch, arguments.tiles.head, place.head);
  const KeyBlocks<Config::kBlockM, kBlockN> blocks(
      sequence, place.start_m, kPlain || tiles == nullptr ? nullptr : tiles + place.start_m / Config::kBlockM * arguments.tiles.line,
      arguments.tiles.num_tiles);
  const ScoreMask mask(sequence, problem, place.batch, place.head);
  const int thread = threadIdx.x, lane = thread % 32, warp_row = thread / 32 * Config::kRowsPerWarp;
  const int rows_left = sequence.rows_present - place.start_m;  // may be below 0

  // Loads: every call is one group of cp.async, an empty one past the last block.
  const auto load_keys = [&](int step, const uint16_t* tensor, int64_t stride, int columns, uint32_t smem, auto tile) {
    using Tile = decltype(tile);
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
  copy_rows_async<QueryTile, Config::kThreads>(q_smem, query, problem.query.row, static_cast<int>(problem.head_dim_qk), thread,
                                               [&](int row) { return row < rows_left; });
  load_k(0);
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    load_v(stage - 1);
    load_k(stage);
  }

  const LaneAddress<QueryTile> q_lane = left_operand<QueryTile>(q_smem, warp_row);
  const LaneAddress<KeyTile> k_lane = right_operand_of_rows<KeyTile>(k_smem);
  const LaneAddress<ValueTile> v_lane = right_operand_of_columns<ValueTile>(v_smem);
  uint32_t q[Config::kQueryInRegisters ? kSteps : 1][kMatrices][4];
  Accumulators<kMatrices, kOutBlocks> acc = {};
  const bool has_sink = !kPlain && problem.sinks != nullptr;
  OnlineSoftmax<kMatrices> softmax([&](int, int) { return has_sink ? problem.sinks[place.head] * kLog2E : -kInfinity; });
  const ScoreTransform transform(arguments, place.batch, place.head);

  const auto step_over = [&](int step, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int start_n = kMasked || !kPlain || Config::kDropout ? blocks.start(step) : 0;
    const int first_row = place.start_m + warp_row;

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
    [[maybe_unused]] std::conditional_t<kBias, Bias<kMatrices, kScoreBlocks>, NoBias> bias(problem, place.batch, place.head);
    if constexpr (kBias) bias.load(first_row, sequence.rows_present - 1, start_n);
    LaneAddress<KeyTile> k_here = k_lane;
    k_here.row += step % kStages * KeyTile::kBytes;
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
    if constexpr (!kPlain) scale = transform.apply(scores, sequence.offset, first_row, start_n, bias);
    if constexpr (kMasked) {
      mask.apply<kPlain>(scores, [&](int m, int half) { return first_row + 16 * m + 8 * half + lane / 4; }, start_n);
    }
    softmax.template update<kMasked || kBias>(scores, scale, acc);
    if (kPlain ? Config::kDropout : problem.dropout_threshold != 0) {
      Dropout(problem, place.batch, place.head).apply(scores, first_row, start_n);
    }

    // O += P V (BLOCK_M, HEAD_DIM_V)
    LaneAddress<ValueTile> v_here = v_lane;
    v_here.row += step % kStages * ValueTile::kBytes;
    multiply_add<kDtype>(acc, scores, v_here);
  };
  int step = 0;
#pragma unroll 1
  for (; step < blocks.num_full; ++step) step_over(step, std::false_type());
#pragma unroll 1
  for (; step < blocks.num_blocks; ++step) step_over(step, std::true_type());
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q has landed and was read: a warp's rows of it may lie in what another warp copied

  softmax.sum_over_quads();
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + lane / 4;
      const bool present = row < rows_left;
      const float factor = present ? softmax.reciprocal_sum(m, half) * arguments.kept_scale : 0.0f;
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        const uint32_t pair = ptx::pack<kDtype>(acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor);
        *reinterpret_cast<uint32_t*>(shared + QueryTile::offset(row, n) + 4 * (lane % 4)) = present ? pair : 0;
      }
      if (lane % 4 == 0 && row < sequence.rows - place.start_m) lse[row] = present ? softmax.lse(m, half) : -kInfinity;
    }
  }
  __syncwarp();
  constexpr int kLanes = ValueTile::kPermuted;
#pragma unroll
  for (int i = 0; i < Config::kRowsPerWarp * kLanes / 32; ++i) {
    const int row = warp_row + i * (32 / kLanes) + lane / kLanes;
#pragma unroll
    for (int chunk = lane % kLanes; chunk < Config::kHeadDimV / kChunk; chunk += kLanes) {
      if (row < sequence.rows - place.start_m && chunk * kChunk < problem.head_dim_v) {
        *reinterpret_cast<uint4*>(out + row * problem.out.row + chunk * kChunk) =
            *reinterpret_cast<const uint4*>(shared + QueryTile::offset(row, chunk));
      }
    }
  }
}

}  // namespace fused_attention::cuda::sm80
