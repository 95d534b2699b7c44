// SPDX-License-Identifier: Apache-2.0
// Forward pass for at most kFewRows query rows, as in decoding: every key is used a few times, so memory is the bound and keys and values
// are read where they lie. A task has some key heads of one sequence and the query heads that read them, and visits the keys in blocks
// of kBlockKeys, four keys of every head at a time: heads that lie next to each other in memory are read as long pieces, which
// the hardware prefetcher follows, and cost one address translation together. For each block:
//   1. S = Q K^T          2. the online softmax, line by line          3. O = O * rescale + P V
// A line is a row of a query head. Tiles that a PreparedMask leaves empty are not read. Included by forward.h.
#pragma once

#include "online_softmax.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kFewRows = 2, kBlockKeys = 512;

template <class T>
class FewRowsForward {
 public:
  // heads_per_task: key heads.
  FewRowsForward(const AttentionProblem& problem, int64_t heads_per_task, char* scratch)
      : problem_(problem),
        heads_per_task_(heads_per_task),
        tasks_per_sequence_((problem.num_heads_kv + heads_per_task - 1) / heads_per_task),
        group_(problem.num_heads / problem.num_heads_kv),
        query_columns_(round_up(problem.head_dim_qk, 16)),
        value_columns_(round_up(problem.head_dim_v, 16)),
        scores_row_(min_of(kBlockKeys, round_up(problem.seqlen_k, 16)) + 16),
        arena_(scratch),
        softmax_(problem, arena_, scores_row_) {
    const int64_t lines = heads_per_task * group_ * problem.seqlen_q;
    queries_ = arena_.take<float>(lines * query_columns_);
    out_ = arena_.take<float>(lines * value_columns_);
    scores_ = arena_.take<float>(lines * scores_row_);
    row_max_ = arena_.take<float>(lines + kLanes);
    row_sum_ = arena_.take<float>(lines + kLanes);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, 16) + 16 : 0);
    zero_row_ = arena_.take<T>(max_of(problem.head_dim_qk, problem.head_dim_v));
    keep_ = arena_.take<uint16_t>(problem.dropout_threshold ? 16 * kKeepWords : 0);  // bits come for 16 rows at a time
    if (problem.row_tiles.data) tile_kinds_ = arena_.take<uint8_t>(heads_per_task * group_ * problem.row_tiles.num_tiles);
  }

  static Plan plan(const AttentionProblem& problem, int num_threads) {
    const int64_t lines_per_head = problem.num_heads / problem.num_heads_kv * problem.seqlen_q, wanted_tasks = 4 * int64_t{num_threads};
    int64_t heads = problem.num_heads_kv;
    while (heads > 1 &&
           (heads * lines_per_head > kMostLines || problem.batch * ((problem.num_heads_kv + heads - 1) / heads) < wanted_tasks))
      heads = (heads + 1) / 2;
    const FewRowsForward pass(problem, heads, nullptr);
    return {problem.batch * pass.tasks_per_sequence_, heads, pass.arena_.used()};
  }

  void run(int64_t first_task, int64_t last_task) {
    __builtin_memset(zero_row_, 0, static_cast<size_t>(max_of(problem_.head_dim_qk, problem_.head_dim_v)) * sizeof(T));
    for (int64_t task = first_task; task < last_task; ++task) {
      enter(task);
      const int64_t keys_end = rows_ > 0 ? visible_keys(bounds_, rows_ - 1) : 0;
      for (int64_t key0 = rows_ > 0 ? first_visible_key(bounds_, 0) / 64 * 64 : 0; key0 < keys_end; key0 += kBlockKeys)
        attend(key0, min_of(kBlockKeys, keys_end - key0));
      write();
    }
  }

 private:
  static constexpr int64_t kMostLines = 32, kKeepWords = kBlockKeys / 16, kRowsAhead = 32, kSize = sizeof(T);

  int64_t first_line(int64_t head) const { return head * problem_.seqlen_q; }  // of a query head of the task

  void enter(int64_t task) {
    if (const int64_t b = task / tasks_per_sequence_; b != b_) {
      b_ = b;
      bounds_ = sequence_bounds(problem_, b);
      if (problem_.key_mask) holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
    }
    rows_ = bounds_.seqlen_q;
    head0_ = task % tasks_per_sequence_ * heads_per_task_;
    heads_ = min_of(heads_per_task_, problem_.num_heads_kv - head0_);
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head, line0 = first_line(head);
      pack_rows(row_ptr<const T>(problem_.query, b_, h, bounds_.first_query), problem_.query.row, rows_, problem_.head_dim_qk,
                queries_ + line0 * query_columns_, query_columns_);
      for (int64_t line = line0; line < line0 + problem_.seqlen_q; ++line) {
        const bool has_sink = problem_.sinks && line - line0 < rows_;
        row_max_[line] = has_sink ? problem_.sinks[h] * kLog2e : -kInfinity;
        row_sum_[line] = has_sink && problem_.sinks[h] != -kInfinity ? 1.0f : 0.0f;
      }
      if (tile_kinds_) expand_tiles(problem_.row_tiles, b_, h, 0, tile_kinds_ + head * problem_.row_tiles.num_tiles);
    }
    for (int64_t i = 0; i < heads_ * group_ * problem_.seqlen_q * value_columns_; i += kLanes) store(out_ + i, broadcast(0.0f));
  }

  uint8_t tile_kind(int64_t head, int64_t key) const {
    return tile_kinds_ ? tile_kinds_[head * problem_.row_tiles.num_tiles + key / 64] : static_cast<uint8_t>(kFullTile);
  }

  void attend(int64_t key0, int64_t keys) {
    visit_keys(problem_.key, problem_.value, key0, keys, problem_.head_dim_qk, [&](int64_t line, int64_t j, const T* const rows[4]) {
      dot_products(queries_ + line * query_columns_, rows, problem_.head_dim_qk, scores_ + line * scores_row_ + j);
    });
    softmax(key0, keys);
    visit_keys(problem_.value, problem_.key, key0, keys, problem_.head_dim_v, [&](int64_t line, int64_t j, const T* const rows[4]) {
      add_weighted(out_ + line * value_columns_, scores_ + line * scores_row_ + j, rows, problem_.head_dim_v);
    });
  }

  // Calls visit(line, j, rows) for every line and every four keys from key0 + j on that its head may see; rows point into `tensor`, to
  // zeros for keys that are absent or past the block. `next`: the tensor that is read after this block.
  template <class Visit>
  FA_MEMBER_INLINE void visit_keys(const StridedTensor& tensor, const StridedTensor& next, int64_t key0, int64_t keys, int64_t head_dim,
                                   Visit&& visit) {
    const T *first = row_ptr<const T>(tensor, b_, head0_, bounds_.first_key + key0),
            *next_first = row_ptr<const T>(next, b_, head0_, bounds_.first_key + key0);
    for (int64_t j = 0; j < keys; j += 4)
      for (int64_t head = 0; head < heads_; ++head) {
        bool seen = !tile_kinds_;
        for (int64_t member = 0; member < group_; ++member) seen |= tile_kind(head * group_ + member, key0 + j) != kEmptyTile;
        if (!seen) continue;
        const T* rows[4];
        for (int64_t n = 0; n < 4; ++n) {
          const int64_t ahead = j + n + kRowsAhead;
          const T* line = ahead < keys ? first + ahead * tensor.row + head * tensor.head
                                       : next_first + min_of(ahead - keys, keys - 1) * next.row + head * next.head;
          for (int64_t d = 0; d < head_dim; d += 64 / kSize) __builtin_prefetch(line + d, 0, 2);
          const bool absent = j + n >= keys || (holes_ && is_absent(key_bias_, key0 + j + n));
          rows[n] = absent ? zero_row_ : first + (j + n) * tensor.row + head * tensor.head;
        }
        for (int64_t member = head * group_; member < (head + 1) * group_; ++member)
          if (tile_kind(member, key0 + j) != kEmptyTile)
            for (int64_t i = 0; i < rows_; ++i) visit(first_line(member) + i, j, rows);
      }
  }

  // scores_ become weights; what PreparedMask has as empty tiles was not computed, and its bits are 0.
  void softmax(int64_t key0, int64_t keys) {
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head;
      bool mixed = false;
      for (int64_t j = 0; j < keys; j += 64) mixed |= tile_kind(head, key0 + j) != kFullTile;
      if (problem_.dropout_threshold)
        dropout_keep_bits(problem_, b_ * problem_.num_heads + h, 0, rows_, key0, (keys + 15) / 16, keep_, kKeepWords);
      softmax_.enter(bounds_, b_, h, holes_ ? key_bias_ : nullptr);
      softmax_.enter_block(0, key0, keys, mixed);
      for (int64_t i = 0; i < rows_; ++i) {
        const int64_t line = first_line(head) + i;
        const float rescale = softmax_.weights(i, scores_ + line * scores_row_, row_max_[line], row_sum_[line], keep_ + i * kKeepWords);
        if (rescale != 1.0f) scale_row(out_ + line * value_columns_, rescale, value_columns_);
      }
    }
  }

  static void add_weighted(float* out, const float weights[4], const T* const values[4], int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec sum = load(out + d);
      for (int n = 0; n < 4; ++n) {
        const Vec value = d + kLanes <= head_dim ? load(values[n] + d) : load_first(values[n] + d, head_dim - d);
        sum = fmadd(broadcast(weights[n]), value, sum);
      }
      store(out + d, sum);
    }
  }

  // out and lse; rows that see nothing, absent ones included, get 0 and -inf.
  void write() {
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head, line0 = first_line(head);
      for (int64_t i = 0; i < bounds_.rows; ++i) {
        const float sum = row_sum_[line0 + i];
        write_row(row_ptr<T>(problem_.out, b_, h, bounds_.first_query + i), sum == 0.0f ? nullptr : out_ + (line0 + i) * value_columns_,
                  problem_.dropout_scale() / sum, problem_.head_dim_v);
      }
      const Vec sums = select(first_lanes(bounds_.rows), load(row_sum_ + line0), broadcast(1.0f));  // those past the last line are unset
      store_first(problem_.lse + lse_offset(problem_, bounds_, b_, h), natural_lse(load(row_max_ + line0), sums), bounds_.rows);
    }
  }

  const AttentionProblem& problem_;
  const int64_t heads_per_task_, tasks_per_sequence_;
  const int64_t group_;  // query heads to a key head
  const int64_t query_columns_, value_columns_, scores_row_;
  Arena arena_;
  OnlineSoftmax softmax_;

  float* queries_;                 // (lines, query_columns)
  float* out_;                     // (lines, value_columns), not yet normalised
  float* scores_;                  // (lines, scores_row)
  float *row_max_, *row_sum_;      // (lines,) the maxima in units of log2
  float* key_bias_;                // (seqlen_k,) 0 or -inf
  T* zero_row_;                    // (head_dim,)
  uint16_t* keep_;                 // (16, kKeepWords) dropout bits of one head
  uint8_t* tile_kinds_ = nullptr;  // (query heads, tiles)

  int64_t b_ = -1, head0_ = 0, heads_ = 0, rows_ = 0;
  SequenceBounds bounds_{};
  bool holes_ = false;
};

}  // namespace fused_attention::cpu::FA_ISA
