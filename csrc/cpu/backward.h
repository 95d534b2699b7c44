// SPDX-License-Identifier: Apache-2.0
// Backward pass with float32 arithmetic; inputs and gradients are stored as float32, bfloat16 or float16. For each query head:
//
//   delta = rowsum(dout * out) - dlse                                             (rows,)
//   for each block of keys, for each block of query rows that sees it:
//     S  = Q K^T,  dP = dout V^T                                                  (rows, keys), which become P and dS: softmax_gradient.h
//     dV += dropout(P)^T dout,   dK += dS^T Q,   dQ += dS K                       dQ is kept for the whole head
//
// Q, dout and dQ of the head live in float32 scratch (3 copies of seqlen_q x head_dim), everything else in blocks of 64 x 64; dK and dV
// of several query heads that share one key head add up in scratch. Where the three copies do not fit a level-2 cache, a block of rows
// meets several blocks of keys in turn. As in FlashAttention (Dao et al., 2022), with the lse gradient folded into delta: d lse / d S = P.
#pragma once

#include "backward_tasks.h"
#include "softmax_gradient.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBackwardRows = SoftmaxGradient::kRows, kBackwardKeys = kKeyTile;

// Blocks of keys that each block of rows meets in turn. One where Q, dout and dQ of a head, which every block of keys reads, stay in a
// level-2 cache for the most part, or where a diagonal keeps rows and keys apart; else as many as fit a part of that cache, packed and
// with their gradients.
static int64_t key_blocks_together(const AttentionProblem& problem) {
  constexpr int64_t kRowsBytes = 4 << 20, kKeysBytes = 512 << 10, kSize = sizeof(float);
  const int64_t query_columns = round_up(problem.head_dim_qk, 16), value_columns = round_up(problem.head_dim_v, 16);
  if (has_diagonal(problem) || problem.seqlen_q * (2 * query_columns + value_columns) * kSize <= kRowsBytes) return 1;
  const int64_t block_bytes = kBackwardKeys * (3 * query_columns + 2 * value_columns) * kSize;
  return max_of(min_of(kKeysBytes / block_bytes, (problem.seqlen_k + kBackwardKeys - 1) / kBackwardKeys), int64_t{1});
}

template <class T>
class BackwardPass {
 public:
  BackwardPass(const AttentionProblem& problem, char* scratch)
      : problem_(problem),
        arena_(scratch),
        tasks_(problem),
        group_(problem.num_heads / max_of(problem.num_heads_kv, int64_t{1})),
        query_columns_(round_up(problem.head_dim_qk, 16)),
        value_columns_(round_up(problem.head_dim_v, 16)),
        few_rows_(problem.seqlen_q <= kFewRows),
        row_blocks_((problem.seqlen_q + kBackwardRows - 1) / kBackwardRows),
        blocks_together_(key_blocks_together(problem)),
        held_keys_(group_ > 1 ? tasks_.most_keys() : blocks_together_ * kBackwardKeys),
        softmax_(problem, arena_) {
    queries_ = arena_.take<float>(problem.seqlen_q * query_columns_);
    douts_ = arena_.take<float>(problem.seqlen_q * value_columns_);
    dqueries_ = arena_.take<float>(problem.seqlen_q * query_columns_);
    keys_t_ = arena_.take<float>(blocks_together_ * kBackwardKeys * query_columns_);
    values_t_ = arena_.take<float>(blocks_together_ * kBackwardKeys * value_columns_);
    keys_ = arena_.take<float>(blocks_together_ * kBackwardKeys * query_columns_);
    dkeys_ = arena_.take<float>(held_keys_ * query_columns_);
    dvalues_ = arena_.take<float>(held_keys_ * value_columns_);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, kBackwardKeys) : 0);
    rows_started_ = arena_.take<uint8_t>(row_blocks_);
    keys_started_ = arena_.take<uint8_t>(held_keys_ / kBackwardKeys);
    if (problem.row_tiles.data) tile_kinds_ = arena_.take<uint8_t>(row_blocks_ * problem.row_tiles.num_tiles);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task)
      tasks_.for_each_head(task, [&](int64_t b, int64_t h_kv, bool) { run_key_head(task, b, h_kv, task + 1 < last_task); });
  }

 private:
  static constexpr int64_t kScoresRow = SoftmaxGradient::kScoresRow, kSize = sizeof(T);

  void run_key_head(int64_t task, int64_t b, int64_t h_kv, bool more) {
    enter(b, h_kv);
    const KeyRange range = tasks_.keys(task, bounds_.seqlen_k);
    for (int64_t n = 0; n < held_keys_ / kBackwardKeys; ++n) keys_started_[n] = 0;
    for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
      const bool last_head = h + 1 == (h_kv + 1) * group_;
      enter_head(task, h);
      load_rows();
      if (problem_.dsinks && tasks_.split(task) == 0)
        store_sink_gradient(problem_, b_, h_, problem_.lse + lse_offset(problem_, bounds_, b_, h_), softmax_.delta(), bounds_.seqlen_q);
      plan_prefetch(more && last_head);
      for (int64_t key0 = range.first; key0 < range.last; key0 += blocks_together_ * kBackwardKeys) {
        const int64_t keys = min_of(blocks_together_ * kBackwardKeys, range.last - key0);
        held_ = group_ > 1 ? key0 - range.first : 0;
        for (int64_t n = 0; group_ == 1 && n < blocks_together_; ++n) keys_started_[n] = 0;
        attend(key0, keys);
        for (int64_t j = 0; last_head && j < keys; j += kBackwardKeys) write_keys(key0 + j, min_of(kBackwardKeys, keys - j), held_ + j);
      }
      if (problem_.dalibi_slopes) problem_.dalibi_slopes[batch_head_ * problem_.num_key_splits + tasks_.split(task)] = softmax_.dslope();
      write_queries(task);
    }
    if (tasks_.split(task) + 1 == problem_.num_key_splits) {
      write_rows(key_row(problem_.dkey, 0), problem_.dkey.row, bounds_.seqlen_k, bounds_.keys, problem_.head_dim_qk, nullptr, 0, 0.0f);
      write_rows(key_row(problem_.dvalue, 0), problem_.dvalue.row, bounds_.seqlen_k, bounds_.keys, problem_.head_dim_v, nullptr, 0, 0.0f);
    }
  }

  T* query_row(const StridedTensor& tensor, int64_t row) const { return row_ptr<T>(tensor, b_, h_, bounds_.first_query + row); }
  T* key_row(const StridedTensor& tensor, int64_t key) const { return row_ptr<T>(tensor, b_, h_kv_, bounds_.first_key + key); }

  void enter(int64_t b, int64_t h_kv) {
    h_kv_ = h_kv;
    if (b == b_) return;
    b_ = b;
    bounds_ = sequence_bounds(problem_, b);
    if (problem_.key_mask) holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, kBackwardKeys));
  }

  void enter_head(int64_t task, int64_t h) {
    h_ = h;
    batch_head_ = b_ * problem_.num_heads + h;
    float* dmask = tasks_.mask_gradient(task);
    if (dmask) dmask += b_ * problem_.dattn_mask_batch + h * problem_.dattn_mask_head;
    softmax_.enter(bounds_, b_, h, holes_ ? key_bias_ : nullptr, dmask);
    for (int64_t block = 0; block < row_blocks_; ++block) {
      rows_started_[block] = 0;
      if (tile_kinds_) expand_tiles(problem_.row_tiles, b_, h, block, tile_kinds_ + block * problem_.row_tiles.num_tiles);
    }
  }

  // Packs Q and dout, and computes delta.
  void load_rows() {
    const int64_t rows = bounds_.seqlen_q;
    pack_rows<T>(query_row(problem_.query, 0), problem_.query.row, rows, problem_.head_dim_qk, queries_, query_columns_);
    pack_rows<T>(query_row(problem_.dout, 0), problem_.dout.row, rows, problem_.head_dim_v, douts_, value_columns_);
    const int64_t offset = lse_offset(problem_, bounds_, b_, h_);
    const float *lse = problem_.lse + offset, *dlse = problem_.dlse ? problem_.dlse + offset : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      float* dout = douts_ + i * value_columns_;
      if (lse[i] == -kInfinity) {  // the row sees nothing: no gradient, whatever is stored in it
        softmax_.enter_row_that_sees_nothing(i);
        for (int64_t d = 0; d < value_columns_; d += kLanes) store(dout + d, broadcast(0.0f));
        for (int64_t d = 0; d < query_columns_; d += kLanes) store(queries_ + i * query_columns_ + d, broadcast(0.0f));
        continue;
      }
      const T* out = query_row(problem_.out, i);
      Vec sum = broadcast(0.0f);
      for (int64_t d = 0; d < problem_.head_dim_v; d += kLanes) {
        const int64_t remaining = problem_.head_dim_v - d;
        sum = fmadd(remaining >= kLanes ? load(out + d) : load_first(out + d, remaining), load(dout + d), sum);
      }
      softmax_.enter_row(i, lse[i], reduce_add(sum) - (dlse ? dlse[i] : 0.0f));
    }
  }

  // Packs a block of keys as the one at `place`, in keys, of those that are together.
  void load_keys(int64_t key0, int64_t keys, int64_t place) {
    const float* absent = holes_ ? key_bias_ + key0 : nullptr;
    const T *key = key_row(problem_.key, key0), *value = key_row(problem_.value, key0);
    pack_rows(key, problem_.key.row, keys, problem_.head_dim_qk, keys_ + place * query_columns_, query_columns_, absent);
    if (few_rows_) {
      pack_rows(value, problem_.value.row, keys, problem_.head_dim_v, values_t_ + place * value_columns_, value_columns_, absent);
    } else {
      pack_transposed(key, problem_.key.row, keys, problem_.head_dim_qk, keys_t_ + place * query_columns_, absent);
      pack_transposed(value, problem_.value.row, keys, problem_.head_dim_v, values_t_ + place * value_columns_, absent);
    }
  }

  // What the products of this head fetch ahead: the gradients' lines, then the next head's inputs.
  void plan_prefetch(bool more) {
    prefetcher_.clear();
    const auto writes = [&](const StridedTensor& tensor, const T* row, int64_t rows, int64_t head_dim) {
      prefetcher_.add_writes(row, tensor.row * kSize, rows, head_dim * kSize);
    };
    writes(problem_.dkey, key_row(problem_.dkey, 0), bounds_.keys, problem_.head_dim_qk);
    writes(problem_.dvalue, key_row(problem_.dvalue, 0), bounds_.keys, problem_.head_dim_v);
    writes(problem_.dquery, query_row(problem_.dquery, 0), bounds_.rows, problem_.head_dim_qk);
    if (const int64_t next = batch_head_ + 1; more && next < problem_.batch * problem_.num_heads) {
      const int64_t b = next / problem_.num_heads, h = next % problem_.num_heads;
      const auto reads = [&](const StridedTensor& tensor, int64_t head, int64_t row, int64_t rows, int64_t head_dim) {
        prefetcher_.add_reads(row_ptr<T>(tensor, b, head, row), tensor.row * kSize, rows, head_dim * kSize);
      };
      const int64_t query0 = first_query_of(problem_, b), key0 = first_key_of(problem_, b), h_kv = key_head(problem_, h);
      reads(problem_.query, h, query0, problem_.seqlen_q, problem_.head_dim_qk);
      reads(problem_.dout, h, query0, problem_.seqlen_q, problem_.head_dim_v);
      reads(problem_.out, h, query0, problem_.seqlen_q, problem_.head_dim_v);
      reads(problem_.key, h_kv, key0, problem_.seqlen_k, problem_.head_dim_qk);
      reads(problem_.value, h_kv, key0, problem_.seqlen_k, problem_.head_dim_v);
    }
    const int64_t row_blocks = (bounds_.seqlen_q + kBackwardRows - 1) / kBackwardRows,
                  key_blocks = (bounds_.seqlen_k + kBackwardKeys - 1) / kBackwardKeys;
    const int64_t blocks = is_causal(problem_) ? (row_blocks * key_blocks + 1) / 2 : row_blocks * key_blocks;
    prefetcher_.spread_over(blocks * (matmul_ticks(kBackwardRows, kBackwardKeys, problem_.head_dim_qk + problem_.head_dim_v) +
                                      matmul_ticks(kBackwardKeys, query_columns_ + value_columns_, kBackwardRows) +
                                      matmul_ticks(kBackwardRows, query_columns_, kBackwardKeys)));
  }

  // All rows that see some of the keys, which are blocks_together_ blocks or fewer.
  void attend(int64_t key0, int64_t keys) {
    const int64_t first_row = first_row_seeing(bounds_, key0) / kBackwardRows * kBackwardRows,
                  rows_end = rows_seeing(bounds_, key0 + keys - 1);
    uint32_t loaded = 0;  // a bit for each block of keys
    for (int64_t row0 = first_row; row0 < rows_end; row0 += kBackwardRows)
      for (int64_t place = 0; place < keys; place += kBackwardKeys) {
        const uint8_t kind = tile_kinds_ ? tile_kinds_[row0 / kBackwardRows * problem_.row_tiles.num_tiles + (key0 + place) / 64]
                                         : static_cast<uint8_t>(kFullTile);
        if (kind == kEmptyTile) continue;
        const int64_t block_keys = min_of(kBackwardKeys, keys - place);
        const uint32_t bit = uint32_t{1} << (place / kBackwardKeys);
        if (!(loaded & bit)) load_keys(key0 + place, block_keys, place), loaded |= bit;
        accumulate(row0, min_of(kBackwardRows, bounds_.seqlen_q - row0), key0 + place, block_keys, place, kind == kMixedTile);
      }
  }

  // One block of P and dS, and its share of dV, dK and dQ.
  void accumulate(int64_t row0, int64_t rows, int64_t key0, int64_t keys, int64_t place, bool mixed) {
    const float *q = queries_ + row0 * query_columns_, *dout = douts_ + row0 * value_columns_,
                *packed_keys = keys_ + place * query_columns_, *keys_t = keys_t_ + place * query_columns_,
                *values_t = values_t_ + place * value_columns_;
    float *weights = softmax_.weights(), *dscores = softmax_.dscores();
    const int64_t columns = round_up(keys, kLanes), held = held_ + place;
    if (few_rows_) {
      matmul_few_rows(rows, keys, query_columns_, q, query_columns_, packed_keys, query_columns_, weights, kScoresRow);
      matmul_few_rows(rows, keys, value_columns_, dout, value_columns_, values_t, value_columns_, dscores, kScoresRow);
    } else {
      matmul(rows, columns, problem_.head_dim_qk, q, query_columns_, 1, keys_t, kBackwardKeys, weights, kScoresRow, false, &prefetcher_);
      matmul(rows, columns, problem_.head_dim_v, dout, value_columns_, 1, values_t, kBackwardKeys, dscores, kScoresRow, false,
             &prefetcher_);
    }
    softmax_.apply(row0, rows, key0, keys, mixed);
    uint8_t &keys_started = keys_started_[held / kBackwardKeys], &rows_started = rows_started_[row0 / kBackwardRows];
    matmul(keys, value_columns_, rows, weights, 1, kScoresRow, dout, value_columns_, dvalues_ + held * value_columns_, value_columns_,
           keys_started != 0, &prefetcher_);
    matmul(keys, query_columns_, rows, dscores, 1, kScoresRow, q, query_columns_, dkeys_ + held * query_columns_, query_columns_,
           keys_started != 0, &prefetcher_);
    matmul(rows, query_columns_, keys, dscores, kScoresRow, 1, packed_keys, query_columns_, dqueries_ + row0 * query_columns_,
           query_columns_, rows_started != 0, &prefetcher_);
    keys_started = rows_started = 1;
  }

  void write_keys(int64_t key0, int64_t keys, int64_t held) {
    const float* absent = holes_ ? key_bias_ + key0 : nullptr;
    const bool seen = keys_started_[held / kBackwardKeys] != 0;
    write_rows(key_row(problem_.dkey, 0), problem_.dkey.row, key0, key0 + keys, problem_.head_dim_qk,
               seen ? dkeys_ + held * query_columns_ : nullptr, query_columns_, problem_.softmax_scale, absent);
    write_rows(key_row(problem_.dvalue, 0), problem_.dvalue.row, key0, key0 + keys, problem_.head_dim_v,
               seen ? dvalues_ + held * value_columns_ : nullptr, value_columns_, problem_.dropout_scale(), absent);
  }

  // dQ of the head, or its share by this task's keys.
  void write_queries(int64_t task) {
    const bool shared = problem_.num_key_splits > 1;
    for (int64_t row0 = 0; row0 < bounds_.seqlen_q; row0 += kBackwardRows) {
      const int64_t end = min_of(row0 + kBackwardRows, bounds_.seqlen_q);
      const float* source = rows_started_[row0 / kBackwardRows] ? dqueries_ + row0 * query_columns_ : nullptr;
      if (shared)
        write_rows(tasks_.dquery_part(task, bounds_, b_, h_), problem_.head_dim_qk, row0, end, problem_.head_dim_qk, source, query_columns_,
                   problem_.softmax_scale);
      else
        write_rows(query_row(problem_.dquery, 0), problem_.dquery.row, row0, end, problem_.head_dim_qk, source, query_columns_,
                   problem_.softmax_scale);
    }
    if (!shared)
      write_rows(query_row(problem_.dquery, 0), problem_.dquery.row, bounds_.seqlen_q, bounds_.rows, problem_.head_dim_qk, nullptr, 0,
                 0.0f);
  }

  // Rows [begin, end) of a gradient that starts at `gradient` = factor * source, or 0 where there is no source or the key is absent.
  template <class U>
  static void write_rows(U* gradient, int64_t stride, int64_t begin, int64_t end, int64_t head_dim, const float* source, int64_t source_row,
                         float factor, const float* absent = nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      const bool zero = !source || is_absent(absent, row - begin);
      write_row(gradient + row * stride, zero ? nullptr : source + (row - begin) * source_row, factor, head_dim);
    }
  }

  const AttentionProblem& problem_;
  Arena arena_;
  const BackwardTasks tasks_;
  const int64_t group_;  // query heads to a key head
  const int64_t query_columns_, value_columns_;
  const bool few_rows_;
  const int64_t row_blocks_;
  const int64_t blocks_together_;  // of keys
  const int64_t held_keys_;        // whose dK and dV are held at a time: those blocks, or all of the task for several query heads
  SoftmaxGradient softmax_;

  float *queries_, *dqueries_;             // (seqlen_q, query_columns)
  float* douts_;                           // (seqlen_q, value_columns)
  float *keys_t_, *values_t_;              // (blocks_together, head_dim, kBackwardKeys), keys transposed; V as it is for a few rows
  float* keys_;                            // (blocks_together, kBackwardKeys, query_columns)
  float* dkeys_;                           // (held_keys, query_columns)
  float* dvalues_;                         // (held_keys, value_columns)
  float* key_bias_;                        // (seqlen_k,) 0 or -inf
  uint8_t *rows_started_, *keys_started_;  // per block: dqueries_, dkeys_ and dvalues_ hold something
  uint8_t* tile_kinds_ = nullptr;          // (row_blocks, tiles) of the head

  int64_t b_ = -1, h_ = 0, h_kv_ = 0, batch_head_ = 0, held_ = 0;
  SequenceBounds bounds_{};
  bool holes_ = false;
  RowPrefetcher prefetcher_;
};

template <class T>
static Plan plan_backward(const AttentionProblem& problem, int /*num_threads*/) {
  return {BackwardTasks(problem).count(), problem.seqlen_q, BackwardPass<T>(problem, nullptr).scratch_bytes()};
}

template <class T>
static void run_backward(const AttentionProblem& problem, const Plan&, int64_t first_task, int64_t last_task, char* scratch) {
  BackwardPass<T>(problem, scratch).run(first_task, last_task);
}

}  // namespace fused_attention::cpu::FA_ISA
