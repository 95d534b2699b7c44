// SPDX-License-Identifier: Apache-2.0
// The attention weights after dropout, for each head or averaged over heads. A task is a block of query rows of one head, or of all heads
// for the mean, which is accumulated in scratch. The weights go to problem.out, a row of Lk per query:
//
//   for each block of keys, for each head:   S = Q K^T,   P = exp2(c S + bias - lse log2 e),   W += dropout(P) / heads
#pragma once
#include "few_rows_forward.h"

namespace fused_attention::cpu::FA_ISA {

template <class T>
class WeightsPass {
 public:
  static constexpr int64_t kRows = 96;

  WeightsPass(const AttentionProblem& problem, char* scratch)
      : problem_(problem),
        dim_qk_(round_up(problem.head_dim_qk, 16)),
        factor_(problem.dropout_scale() / static_cast<float>(problem.average_heads ? problem.num_heads : 1)),
        softcap_(problem),
        score_bias_(problem) {
    Arena arena(scratch);
    key_t_ = arena.take<float>(kBlockKeys * problem.head_dim_qk);
    query_rows_ = arena.take<float>(kRows * dim_qk_);
    scores_ = arena.take<float>(kRows * kScoreStride);
    mean_ = arena.take<float>(problem.average_heads ? kRows * kScoreStride : 0);
    bias_ = arena.take<float>(kScoreStride);
    key_bias_ = arena.take<float>(problem.key_mask ? round_up(problem.seqlen_k, 16) + 16 : 0);
    keep_bits_ = arena.take<uint16_t>(problem.dropout_threshold ? kRows * kKeepWords : 0);
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }
  int64_t num_tasks() const { return problem_.batch * (problem_.average_heads ? 1 : problem_.num_heads) * blocks(); }

  void run(int64_t first_task, int64_t last_task) {
    const int64_t heads = problem_.average_heads ? 1 : problem_.num_heads;
    for (int64_t task = first_task; task < last_task; ++task) {
      set_batch(task / blocks() / heads);
      const int64_t head = task / blocks() % heads, row0 = task % blocks() * kRows, rows = min_of(kRows, problem_.seqlen_q - row0);
      for (int64_t key0 = 0; key0 < problem_.seqlen_k; key0 += kBlockKeys) {
        const int64_t keys = min_of(kBlockKeys, problem_.seqlen_k - key0);
        if (!problem_.average_heads) {
          compute(head, row0, rows, key0, keys);
          store_weights(head, row0, rows, key0, keys, scores_);
          continue;
        }
        for (int64_t h = 0; h < problem_.num_heads; ++h) {
          prefetch(h + 1 < problem_.num_heads ? h + 1 : 0, row0, rows, key0, keys);
          compute(h, row0, rows, key0, keys);
          add_to_mean(h, rows, keys);
        }
        store_weights(0, row0, rows, key0, keys, mean_);
      }
    }
  }

 private:
  static constexpr int64_t kScoreStride = kBlockKeys + 16, kKeepWords = kBlockKeys / 16;

  int64_t blocks() const { return (problem_.seqlen_q + kRows - 1) / kRows; }

  void set_batch(int64_t b) {
    if (b == batch_) return;
    batch_ = b;
    bounds_ = sequence_bounds(problem_, b);
    if (problem_.key_mask) has_holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
  }

  // Prefetches the next head's inputs during this head's products; rows of a (B, L, H, D) tensor are far apart.
  void prefetch(int64_t next_head, int64_t row0, int64_t rows, int64_t key0, int64_t keys) {
    prefetcher_.clear();
    const int64_t row_bytes = problem_.head_dim_qk * static_cast<int64_t>(sizeof(T)), size = static_cast<int64_t>(sizeof(T));
    const StridedTensor &query = problem_.query, &key = problem_.key;
    prefetcher_.add_reads(row_ptr<const T>(query, batch_, next_head, row0), query.row * size, rows, row_bytes);
    prefetcher_.add_reads(row_ptr<const T>(key, batch_, key_head(problem_, next_head), key0), key.row * size, keys, row_bytes);
    prefetcher_.spread_over(matmul_ticks(rows, keys, problem_.head_dim_qk));
  }

  void add_to_mean(int64_t h, int64_t rows, int64_t keys) {
    for (int64_t i = 0; i < rows * kScoreStride; i += kScoreStride)
      for (int64_t j = i; j < i + keys; j += kLanes) store(mean_ + j, h == 0 ? load(scores_ + j) : add(load(mean_ + j), load(scores_ + j)));
  }

  // Replaces scores_ by the weights of one head, 0 for pairs that do not attend.
  void compute(int64_t h, int64_t row0, int64_t rows, int64_t key0, int64_t keys) {
    const int64_t rows_present = min_of(bounds_.seqlen_q - row0, rows);
    const int64_t seen = rows_present > 0 ? min_of(visible_keys(bounds_, row0 + rows_present - 1) - key0, keys) : 0;
    if (seen <= 0) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < keys; j += kLanes) store(scores_ + i * kScoreStride + j, broadcast(0.0f));
      return;
    }
    pack_rows(row_ptr<const T>(problem_.query, batch_, h, row0), problem_.query.row, rows_present, problem_.head_dim_qk, query_rows_,
              dim_qk_);
    pack_transposed(row_ptr<const T>(problem_.key, batch_, key_head(problem_, h), key0), problem_.key.row, seen, problem_.head_dim_qk,
                    key_t_, has_holes_ ? key_bias_ + key0 : nullptr);
    for (int64_t j = 0; j < seen; j += kKeyTile)
      matmul(rows_present, min_of(kKeyTile, round_up(seen - j, kLanes)), problem_.head_dim_qk, query_rows_, dim_qk_, 1,
             key_t_ + j * problem_.head_dim_qk, kKeyTile, scores_ + j, kScoreStride, false, &prefetcher_);
    if (problem_.dropout_threshold)
      dropout_keep_bits(problem_, batch_ * problem_.num_heads + h, row0, rows_present, key0, (seen + 15) / 16, keep_bits_, kKeepWords);
    score_bias_.enter(bounds_, batch_, h, has_holes_ ? key_bias_ : nullptr);
    const float* lse = problem_.lse + (batch_ * problem_.num_heads + h) * problem_.seqlen_q + row0;
    for (int64_t i = 0; i < rows; ++i)
      weights_row(i < rows_present && lse[i] != -kInfinity ? seen : 0, row0 + i, key0, keys, lse[i], scores_ + i * kScoreStride,
                  keep_bits_ + i * kKeepWords);
  }

  void weights_row(int64_t seen, int64_t row, int64_t key0, int64_t keys, float lse, float* scores, const uint16_t* keep) {
    const bool mixed = problem_.mask_bits.data != nullptr;
    const int64_t visible = seen > 0 ? max_of(min_of(visible_keys(bounds_, row) - key0, seen), int64_t{0}) : 0;
    const bool biased = visible > 0 && score_bias_.needed(mixed);
    if (biased) score_bias_.fill(row, key0, visible, mixed, bias_);
    const WeightOfScore weight_of(lse);
    int64_t j = 0;
    for (; j < visible; j += kLanes) {
      const Vec score = biased_scores(load(scores + j), problem_.softmax_scale, softcap_, biased ? load(bias_ + j) : broadcast(0.0f));
      LaneMask kept = first_lanes(visible - j);
      if (problem_.dropout_threshold) kept = kept & lanes_of_bits(keep[j / 16], static_cast<int>(j % 16));
      store(scores + j, keep_where(kept, mul(weight_of(score), broadcast(factor_))));
    }
    for (; j < keys; j += kLanes) store(scores + j, broadcast(0.0f));
  }

  void store_weights(int64_t head, int64_t row0, int64_t rows, int64_t key0, int64_t keys, const float* weights) const {
    for (int64_t i = 0; i < rows; ++i) {
      T* to = row_ptr<T>(problem_.out, batch_, head, row0 + i) + key0;
      const float* from = weights + i * kScoreStride;
      int64_t j = 0;
      for (; j + kLanes <= keys; j += kLanes) store(to + j, load(from + j));
      if (j < keys) store_first(to + j, load(from + j), keys - j);
    }
  }

  const AttentionProblem& problem_;
  const int64_t dim_qk_;
  const float factor_;
  const Softcap softcap_;
  ScoreBias score_bias_;
  size_t scratch_bytes_;

  float* key_t_;         // (tiles, head_dim_qk, kKeyTile)
  float* query_rows_;    // (kRows, dim_qk)
  float* scores_;        // (kRows, kScoreStride) of one head
  float* mean_;          // (kRows, kScoreStride)
  float* bias_;          // (kBlockKeys,) of one row
  float* key_bias_;      // (seqlen_k,) 0 or -inf
  uint16_t* keep_bits_;  // (kRows, kKeepWords) dropout bits

  int64_t batch_ = -1;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

template <class T>
static Plan plan_weights(const AttentionProblem& problem, int /*num_threads*/) {
  const WeightsPass<T> pass(problem, nullptr);
  return {pass.num_tasks(), WeightsPass<T>::kRows, pass.scratch_bytes()};
}

template <class T>
static void run_weights(const AttentionProblem& problem, const Plan&, int64_t first_task, int64_t last_task, char* scratch) {
  WeightsPass<T>(problem, scratch).run(first_task, last_task);
}

}  // namespace fused_attention::cpu::FA_ISA
