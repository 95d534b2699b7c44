// SPDX-License-Identifier: Apache-2.0
// The kernel for few query rows and many keys, compute capability 8.0 and newer: its time is that of reading K and V once.
//
// The rows of all query heads that share a key head form one matrix of 16 rows (row r is query r % Lq of head r / Lq of the group). Each
// warp visits its own 16 keys of every block of 64, copies them itself and needs no barrier; the warps' results are merged at the end. With
// num_splits > 1 a block sees only its share of the keys, and combine.cuh merges the blocks' results.
#pragma once
#include "../row.cuh"
#include "../scores.cuh"

namespace fused_attention::cuda::sm80 {

struct Decode : Row {
  static_assert(kBlockM == 16 && kBlockN == 16 * kWarps, "each warp takes one 16 x 16 piece of the scores");
  static constexpr int kSteps = kHeadDimQk / 16;
  static constexpr bool kQueryInRegisters = kHeadDimQk <= 128;

  using QueryTile = SharedTile<16, kHeadDimQk>;
  using KeyTile = SharedTile<16, kHeadDimQk>;  // of one warp
  using ValueTile = SharedTile<16, kHeadDimV>;
  union SharedMemory {
    struct {
      QueryTile q;
      KeyTile k[kWarps][kStages];
      ValueTile v[kWarps][kStages];
    } tiles;
    struct {  // at the end, for each warp; padded so that the rows of a matrix are in different banks
      float out[kWarps][16][kHeadDimV + 8];
      float statistics[kWarps][16][2];  // row_max, row_sum
    } merged;
  };

  static FA_DEVICE void run(const ForwardArguments& arguments);
};

FA_DEVICE void Decode::run(const ForwardArguments& arguments) {
  auto& shared = shared_memory<Decode>();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  auto& q_tile = shared.tiles.q;
  auto& k_tiles = shared.tiles.k[warp];
  auto& v_tiles = shared.tiles.v[warp];

  // Grid: splits innermost, then blocks of rows, key heads, batch elements.
  const AttentionProblem& problem = arguments.problem;
  const int seqlen_q = static_cast<int>(problem.seqlen_q), num_rows = arguments.heads_per_group * seqlen_q;
  const auto num_splits = static_cast<uint32_t>(arguments.num_splits),
             row_blocks = static_cast<uint32_t>((num_rows + kBlockM - 1) / kBlockM);
  const int split = blockIdx.x % num_splits, start_m = blockIdx.x / num_splits % row_blocks * kBlockM;
  const uint32_t key_line = blockIdx.x / num_splits / row_blocks, num_heads_kv = static_cast<uint32_t>(problem.num_heads_kv);
  const int64_t key_head = key_line % num_heads_kv, batch = key_line / num_heads_kv;
  const Sequence sequence(problem, batch);
  const ScoreMask mask{sequence, problem, static_cast<int>(batch), 0};
  const auto head_of = [&](int row) { return key_head * arguments.heads_per_group + row / seqlen_q; };
  const auto of_lane = [&](int half) { return start_m + 8 * half + lane / 4; };  // the rows of this lane's accumulators
  const auto* const key = static_cast<const uint16_t*>(problem.key.data) + batch * problem.key.batch + key_head * problem.key.head;
  const auto* const value = static_cast<const uint16_t*>(problem.value.data) + batch * problem.value.batch + key_head * problem.value.head;

  // The blocks of 64 keys that any row sees, and this split's share of them.
  const KeyRange seen = {sequence.keys_of(0).from, sequence.keys_of(seqlen_q - 1).to};
  const int first_block = seen.from / kBlockN, num_blocks = max((max(seen.to, 0) + kBlockN - 1) / kBlockN - first_block, 0);
  const int share = (num_blocks + arguments.num_splits - 1) / arguments.num_splits;
  const int begin = first_block + min(split * share, num_blocks), steps = first_block + min((split + 1) * share, num_blocks) - begin;
  const auto first_key_of = [&](int step) { return (begin + step) * kBlockN + 16 * warp; };

  // Loads: every call is one group of cp.async, an empty one past the last block.
  const auto load = [&](int step, const uint16_t* tensor, int64_t stride, int64_t columns, auto& tiles) {
    if (step < steps) {
      const int first_key = first_key_of(step);
      copy_rows_async<32>(tiles[step % kStages], tensor + first_key * stride, stride, static_cast<int>(columns), lane,
                          [&](int row) { return mask.key_exists(first_key + row); });
    }
    ptx::cp_async_commit();
  };
  const auto load_k = [&](int step) { load(step, key, problem.key.row, problem.head_dim_qk, k_tiles); };
  const auto load_v = [&](int step) { load(step, value, problem.value.row, problem.head_dim_v, v_tiles); };
  const auto* const query = static_cast<const uint16_t*>(problem.query.data) + batch * problem.query.batch;
  for (int piece = thread; piece < kBlockM * kHeadDimQk / kChunk; piece += kThreads) {
    const int row = piece / (kHeadDimQk / kChunk), chunk = piece % (kHeadDimQk / kChunk), place = start_m + row;
    const uint16_t* const source = query + head_of(place) * problem.query.head + place % seqlen_q * problem.query.row + chunk * kChunk;
    ptx::cp_async_16(ptx::shared_address(&q_tile) + QueryTile::offset(row, chunk), source,
                     place < num_rows && chunk * kChunk < problem.head_dim_qk);
  }
  ptx::cp_async_commit();
  load_k(0);
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    load_v(stage - 1);
    load_k(stage);
  }
  ptx::cp_async_wait<2 * kStages - 1>();
  __syncthreads();  // Q has landed, copied by all warps

  const auto q_lane = q_tile.by_rows();
  const auto k_lane = k_tiles[0].by_columns();
  const auto v_lane = v_tiles[0].by_rows();
  uint32_t q[kQueryInRegisters ? kSteps : 1][4];
  if constexpr (kQueryInRegisters) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) q_lane(i, 0, q[i]);
  }
  int queries[2];
  float slope_log2[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = of_lane(half);
    queries[half] = row % seqlen_q;
    const bool has_slope = problem.alibi_slopes != nullptr && row < num_rows;
    slope_log2[half] =
        has_slope ? problem.alibi_slopes[batch * problem.alibi_slopes_batch + head_of(row) * problem.alibi_slopes_head] * kLog2E : 0.0f;
  }
  Accumulators<1, kHeadDimV / 8> acc = {};
  OnlineSoftmax<1> softmax([&](int, int half) {  // a sink counts once
    const bool has_sink = problem.sinks != nullptr && split == 0 && warp == 0 && of_lane(half) < num_rows;
    return has_sink ? problem.sinks[head_of(of_lane(half))] * kLog2E : -kInfinity;
  });

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int first_key = first_key_of(step);
    ptx::cp_async_wait<2 * kStages - 2>();  // K of this step
    __syncwarp();
    load_v(step + kStages - 1);

    // S = Q K^T (16, 16)
    Accumulators<1, 2> scores;
    multiply_transposed<kDtype>(
        scores,
        [&](int i, int, uint32_t (&a)[4]) {
          if constexpr (kQueryInRegisters) {
#pragma unroll
            for (int word = 0; word < 4; ++word) a[word] = q[i][word];
          } else {
            q_lane(i, 0, a);
          }
        },
        k_lane[step % kStages]);
    ptx::cp_async_wait<2 * kStages - 2>();  // V of this step
    __syncwarp();
    load_k(step + kStages);

    // P = softmax(S)
    float scale = arguments.score_scale;
    if (arguments.softcap_log2 != 0.0f) {
      for_each_element(scores, [&](float& score, int, int) { score = accurate_tanh(score * scale) * arguments.softcap_log2; });
      scale = 1.0f;
    }
    if (problem.alibi_slopes != nullptr) {
      for_each_element(scores, [&](float& score, int row, int place) {
        const int distance = first_key + place - queries[row / 8] - sequence.offset;
        score = fmaf(score, scale, -slope_log2[row / 8] * static_cast<float>(abs(distance)));
      });
      scale = 1.0f;
    }
    mask.apply<false>(scores, [&](int, int half) { return queries[half]; }, first_key);
    softmax.template update<true>(scores, scale, acc);

    // O += P V (16, HEAD_DIM_V)
    multiply_add<kDtype>(acc, scores, v_lane[step % kStages]);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q, K and V were read

  auto& of_warps = shared.merged;
  softmax.sum_over_quads();
  for_each_element(acc, [&](float& element, int row, int column) { of_warps.out[warp][row][column] = element; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane % 4 == 0) {
      float (&statistics)[2] = of_warps.statistics[warp][8 * half + lane / 4];
      statistics[0] = softmax.row_max[0][half];
      statistics[1] = softmax.row_sum[0][half];
    }
  }
  __syncthreads();

  // Merge: threads are split evenly among the rows, and take eight columns at a time.
  constexpr int kThreadsPerRow = kThreads / kBlockM;
  const int row = thread / kThreadsPerRow, place = start_m + row;
  if (place >= num_rows) return;
  OnlineSoftmax<1> merged([](int, int) { return -kInfinity; });
  float(&merged_max) = merged.row_max[0][0], (&merged_sum) = merged.row_sum[0][0];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) merged_max = fmaxf(merged_max, of_warps.statistics[w][row][0]);
  float factor[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float (&statistics)[2] = of_warps.statistics[w][row];
    factor[w] = ptx::ex2(statistics[0] - (merged_max == -kInfinity ? 0.0f : merged_max));
    merged_sum = fmaf(statistics[1], factor[w], merged_sum);
  }
  const float reciprocal = merged.reciprocal_sum(0, 0), lse = merged.lse(0, 0);
  const int64_t head = head_of(place), query_row = place % seqlen_q;
  const int64_t lines = problem.batch * problem.num_heads * seqlen_q, line = (batch * problem.num_heads + head) * seqlen_q + query_row;
  const bool final = arguments.num_splits == 1;
  if (thread % kThreadsPerRow == 0) (final ? problem.lse + line : arguments.partial_lse + split * lines + line)[0] = lse;
  for (int column = thread % kThreadsPerRow * kChunk; column < problem.head_dim_v; column += kThreadsPerRow * kChunk) {
    float sums[kChunk] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4* const terms = reinterpret_cast<const float4*>(&of_warps.out[w][row][column]);
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        const float4 four = terms[quarter];
        sums[4 * quarter] = fmaf(four.x, factor[w], sums[4 * quarter]);
        sums[4 * quarter + 1] = fmaf(four.y, factor[w], sums[4 * quarter + 1]);
        sums[4 * quarter + 2] = fmaf(four.z, factor[w], sums[4 * quarter + 2]);
        sums[4 * quarter + 3] = fmaf(four.w, factor[w], sums[4 * quarter + 3]);
      }
    }
#pragma unroll
    for (float& sum : sums) sum *= reciprocal;
    if (final) {
      auto* const out = static_cast<uint16_t*>(problem.out.data) + batch * problem.out.batch + head * problem.out.head +
                        query_row * problem.out.row + column;
      *reinterpret_cast<uint4*>(out) = {ptx::pack<kDtype>(sums[0], sums[1]), ptx::pack<kDtype>(sums[2], sums[3]),
                                        ptx::pack<kDtype>(sums[4], sums[5]), ptx::pack<kDtype>(sums[6], sums[7])};
    } else {
      float4* const partial = reinterpret_cast<float4*>(arguments.partial_out + (split * lines + line) * problem.head_dim_v + column);
      partial[0] = {sums[0], sums[1], sums[2], sums[3]};
      partial[1] = {sums[4], sums[5], sums[6], sums[7]};
    }
  }
}

}  // namespace fused_attention::cuda::sm80
