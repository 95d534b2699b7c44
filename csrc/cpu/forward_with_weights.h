// SPDX-License-Identifier: Apache-2.0
// The float32 forward pass that also returns the weights averaged over heads, for problems whose keys fit one block: the weights of a head
// lie in scratch anyway. A task is a block of query rows of all heads; their mean is accumulated in scratch.
//
//   for each head:   S = Q K^T,   P = exp2(c S + bias - row_max),   out = dropout(P) V / row_sum,   W += dropout(P) / (row_sum heads)
#pragma once
#include "few_rows_forward.h"

namespace fused_attention::cpu::FA_ISA {

class ForwardWithWeights {
 public:
  static constexpr int64_t kRows = 96;

  ForwardWithWeights(const AttentionProblem& problem, char* scratch)
      : problem_(problem),
        dim_v_(round_up(problem.head_dim_v, 16)),
        score_stride_(round_up(problem.seqlen_k, kKeyTile) + 16),
        arena_(scratch),
        softmax_(problem, arena_, score_stride_) {
    const int64_t keys = round_up(problem.seqlen_k, kKeyTile);
    key_t_ = arena_.take<float>(keys * problem.head_dim_qk);
    value_rows_ = arena_.take<float>(keys * dim_v_);
    acc_ = arena_.take<float>(kRows * dim_v_);
    scores_ = arena_.take<float>(kRows * score_stride_);
    mean_ = arena_.take<float>(kRows * score_stride_);
    row_max_ = arena_.take<float>(kRows);
    row_sum_ = arena_.take<float>(kRows);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, 16) + 16 : 0);
    keep_bits_ = arena_.take<uint16_t>(problem.dropout_threshold ? kRows * kKeepWords : 0);
  }

  size_t scratch_bytes() const { return arena_.used(); }
  int64_t num_tasks() const { return problem_.batch * blocks(); }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task) {
      set_batch(task / blocks());
      const int64_t row0 = task % blocks() * kRows, rows = min_of(kRows, problem_.seqlen_q - row0);
      const int64_t rows_present = min_of(max_of(bounds_.seqlen_q - row0, int64_t{0}), rows);
      const int64_t keys =
          rows_present > 0 ? min_of(max_of(visible_keys(bounds_, row0 + rows_present - 1), int64_t{0}), problem_.seqlen_k) : 0;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < problem_.seqlen_k; j += kLanes) store(mean_ + i * score_stride_ + j, broadcast(0.0f));
      for (int64_t h = 0; h < problem_.num_heads; ++h) {
        start_rows(h, rows_present);
        if (keys > 0) attend(h, row0, rows_present, keys);
        store_head(h, row0, rows, rows_present, keys);
      }
      float* to = problem_.mean_weights + (batch_ * problem_.seqlen_q + row0) * problem_.seqlen_k;
      for (int64_t i = 0; i < rows; ++i, to += problem_.seqlen_k) store_row(to, mean_ + i * score_stride_, 1.0f, problem_.seqlen_k);
    }
  }

 private:
  static constexpr int64_t kKeepWords = kBlockKeys / 16;

  int64_t blocks() const { return (problem_.seqlen_q + kRows - 1) / kRows; }

  void set_batch(int64_t b) {
    if (b == batch_) return;
    batch_ = b, packed_head_ = -1;
    bounds_ = sequence_bounds(problem_, b);
    if (problem_.key_mask) has_holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
  }

  void start_rows(int64_t h, int64_t rows_present) {
    const float sink = problem_.sinks ? problem_.sinks[h] * kLog2e : -kInfinity;
    for (int64_t i = 0; i < kRows; i += kLanes) {
      const LaneMask present = first_lanes(sink == -kInfinity ? 0 : rows_present - i);
      store(row_max_ + i, select(present, broadcast(sink), broadcast(-kInfinity)));
      store(row_sum_ + i, select(present, broadcast(1.0f), broadcast(0.0f)));
    }
  }

  // Weights of one head, not yet divided by row_sum_, in scores_; their products with V in acc_.
  void attend(int64_t h, int64_t row0, int64_t rows, int64_t keys) {
    pack(h, row0, rows, keys);
    const float* query = row_ptr<const float>(problem_.query, batch_, h, bounds_.first_query + row0);
    for (int64_t j = 0; j < keys; j += kKeyTile)
      matmul(rows, min_of(kKeyTile, round_up(keys - j, kLanes)), problem_.head_dim_qk, query, problem_.query.row, 1,
             key_t_ + j * problem_.head_dim_qk, kKeyTile, scores_ + j, score_stride_, false, &prefetcher_);
    if (problem_.dropout_threshold)
      dropout_keep_bits(problem_, batch_ * problem_.num_heads + h, row0, rows, 0, (keys + 15) / 16, keep_bits_, kKeepWords);
    softmax_.enter(bounds_, batch_, h, has_holes_ ? key_bias_ : nullptr);
    softmax_.enter_block(row0, 0, keys, problem_.mask_bits.data != nullptr);
    for (int64_t i = 0; i < rows; ++i)
      softmax_.weights(row0 + i, scores_ + i * score_stride_, row_max_[i], row_sum_[i], keep_bits_ + i * kKeepWords);
    matmul(rows, dim_v_, keys, scores_, score_stride_, 1, value_rows_, dim_v_, acc_, dim_v_, false, &prefetcher_);
  }

  void pack(int64_t h, int64_t row0, int64_t rows, int64_t keys) {
    const int64_t kv_head = key_head(problem_, h);
    if (kv_head != packed_head_ || keys > packed_keys_) {
      packed_head_ = kv_head, packed_keys_ = keys;
      const float* absent = has_holes_ ? key_bias_ : nullptr;
      pack_transposed(row_ptr<const float>(problem_.key, batch_, kv_head, bounds_.first_key), problem_.key.row, keys, problem_.head_dim_qk,
                      key_t_, absent);
      pack_rows(row_ptr<const float>(problem_.value, batch_, kv_head, bounds_.first_key), problem_.value.row, keys, problem_.head_dim_v,
                value_rows_, dim_v_, absent);
    }
    prefetcher_.clear();
    if (h + 1 == problem_.num_heads) return;
    const int64_t size = sizeof(float), next = key_head(problem_, h + 1);
    prefetcher_.add_reads(row_ptr<const float>(problem_.query, batch_, h + 1, bounds_.first_query + row0), problem_.query.row * size, rows,
                          problem_.head_dim_qk * size);
    prefetcher_.add_reads(row_ptr<const float>(problem_.key, batch_, next, bounds_.first_key), problem_.key.row * size, keys,
                          problem_.head_dim_qk * size);
    prefetcher_.add_reads(row_ptr<const float>(problem_.value, batch_, next, bounds_.first_key), problem_.value.row * size, keys,
                          problem_.head_dim_v * size);
    prefetcher_.spread_over(matmul_ticks(rows, keys, problem_.head_dim_qk) + matmul_ticks(rows, dim_v_, keys));
  }

  // Stores out and lse of the head's rows, 0 and -inf for those that see nothing, and adds its weights to the mean.
  void store_head(int64_t h, int64_t row0, int64_t rows, int64_t rows_present, int64_t keys) {
    const float scale = problem_.dropout_scale(), heads = static_cast<float>(problem_.num_heads);
    for (int64_t i = 0; i < rows; ++i) {
      const bool empty = keys == 0 || i >= rows_present || row_sum_[i] == 0.0f;
      store_row(row_ptr<float>(problem_.out, batch_, h, bounds_.first_query + row0 + i), empty ? nullptr : acc_ + i * dim_v_,
                scale / row_sum_[i], problem_.head_dim_v);
      if (empty) continue;
      const Vec share = broadcast(scale / (row_sum_[i] * heads));
      float* mean = mean_ + i * score_stride_;
      const float* weights = scores_ + i * score_stride_;
      for (int64_t j = 0; j < keys; j += kLanes) store(mean + j, fmadd(load(weights + j), share, load(mean + j)));
    }
    float* lse = problem_.lse + lse_offset(problem_, bounds_, batch_, h) + row0;
    for (int64_t i = 0; i < rows; i += kLanes) store_first(lse + i, natural_lse(load(row_max_ + i), load(row_sum_ + i)), rows - i);
  }

  const AttentionProblem& problem_;
  const int64_t dim_v_, score_stride_;
  Arena arena_;
  OnlineSoftmax softmax_;

  float* key_t_;         // (tiles, head_dim_qk, kKeyTile)
  float* value_rows_;    // (keys, dim_v)
  float* acc_;           // (kRows, dim_v)
  float* scores_;        // (kRows, score_stride) of one head
  float* mean_;          // (kRows, score_stride)
  float* row_max_;       // (kRows,) in log2 units
  float* row_sum_;       // (kRows,)
  float* key_bias_;      // (seqlen_k,) 0 or -inf
  uint16_t* keep_bits_;  // (kRows, kKeepWords) dropout bits

  int64_t batch_ = -1, packed_head_ = -1, packed_keys_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

[[maybe_unused]] static Plan plan_forward_with_weights(const AttentionProblem& problem, int /*num_threads*/) {
  const ForwardWithWeights pass(problem, nullptr);
  return {pass.num_tasks(), ForwardWithWeights::kRows, pass.scratch_bytes()};
}

[[maybe_unused]] static void run_forward_with_weights(const AttentionProblem& problem, const Plan&, int64_t first_task, int64_t last_task,
                                                      char* scratch) {
  ForwardWithWeights(problem, scratch).run(first_task, last_task);
}

}  // namespace fused_attention::cpu::FA_ISA
