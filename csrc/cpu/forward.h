// SPDX-License-Identifier: Apache-2.0
// Forward pass with float32 arithmetic; query, key, value and out are stored as float32, bfloat16 or float16.
//
// A task covers some query rows of one head and visits the keys they see in blocks of at most kBlockKeys:
//   1. pack K^T and V of the key block to float32 (kept for the head's next task when one block holds all keys)
//   2. for each block of query rows:  S = Q K^T                                 (rows, keys)
//   3.   row by row, soft cap, bias and online softmax:  P = exp2(c S - row_max), c = scale log2 e
//   4.   O = O * exp2(old row_max - row_max) + dropout(P) V                     (rows, head_dim_v)
//   5. out = O * dropout_scale / row_sum,  lse = (row_max + log2 row_sum) ln 2
// Where a sequence has at most kFewRows query rows (decoding), packing a key would cost more than using it: see few_rows_forward.h.
// A sink is a key without a value: row_max starts from it and row_sum from 1. Empty tiles of a PreparedMask are skipped, and each run of
// full or mixed tiles goes through steps 2 to 4 separately.
// The blocks and their recurrence follow FlashAttention (Dao et al., 2022).
#pragma once
#include "few_rows_forward.h"

namespace fused_attention::cpu::FA_ISA {

// Query rows in one block of scores, a multiple of 16. Small blocks waste less under a causal mask.
static int64_t forward_block_rows(const AttentionProblem& problem) {
  if (problem.row_tiles.data) return 64;
  const bool causal = is_causal(problem);
  if (problem.seqlen_q <= 64) return causal || problem.dtype == Dtype::float32 ? 32 : round_up(problem.seqlen_q, 16);
  return causal && problem.seqlen_q <= 1024 ? 48 : 96;
}

// Keys in one block: as many as leave half of L2 to everything else when K^T and V are packed, but at least kLeastKeys.
static int64_t forward_block_keys(const AttentionProblem& problem) {
  constexpr int64_t kLeastKeys = 2 * kKeyTile;
  if (problem.seqlen_k <= kLeastKeys) return kBlockKeys;  // one block in any case, and a short call need not ask for L2
  const int64_t key_bytes = (problem.head_dim_qk + round_up(problem.head_dim_v, 16)) * static_cast<int64_t>(sizeof(float)),
                most_bytes = l2_bytes() / 2;
  int64_t keys = kBlockKeys;
  while (keys > kLeastKeys && keys * key_bytes > most_bytes) keys /= 2;
  return keys;
}

// If all keys fit one block, they stay packed from task to task, so a task is one block of rows. With more keys, every task packs all of
// them once, which costs about as much as 30 rows of products, so a task covers several blocks of rows. Its Q and O stay within 768 KiB,
// and there are enough tasks to give each thread several.
static int64_t forward_rows_per_task(const AttentionProblem& problem, int num_threads) {
  const int64_t block_rows = forward_block_rows(problem);
  if (problem.seqlen_k <= forward_block_keys(problem)) return block_rows;
  const int64_t columns = round_up(problem.head_dim_qk, 16) + round_up(problem.head_dim_v, 16);
  int64_t blocks = max_of(min_of(196608 / columns, int64_t{960}) / block_rows, int64_t{1});
  const int64_t heads = problem.batch * problem.num_heads, wanted_tasks = 4 * int64_t{num_threads};
  while (blocks > 1 && heads * ((problem.seqlen_q + block_rows * blocks - 1) / (block_rows * blocks)) < wanted_tasks) --blocks;
  return block_rows * blocks;
}

template <class T>
class ForwardPass {
 public:
  ForwardPass(const AttentionProblem& problem, int64_t rows_per_task, char* scratch)
      : problem_(problem),
        block_rows_(forward_block_rows(problem)),
        rows_per_task_(rows_per_task),
        tasks_per_head_((problem.seqlen_q + rows_per_task - 1) / rows_per_task),
        dim_qk_(round_up(problem.head_dim_qk, 16)),
        dim_v_(round_up(problem.head_dim_v, 16)),
        most_keys_(forward_block_keys(problem)),
        score_stride_(min_of(most_keys_, round_up(problem.seqlen_k, kKeyTile)) + 16),
        arena_(scratch),
        softmax_(problem, arena_, score_stride_) {
    const int64_t block_keys = score_stride_ - 16;
    key_t_ = arena_.take<float>(block_keys * problem.head_dim_qk);
    value_rows_ = arena_.take<float>(block_keys * dim_v_);
    packed_query_ = arena_.take<float>(rows_per_task * dim_qk_);
    acc_ = arena_.take<float>(rows_per_task * dim_v_);
    scores_ = arena_.take<float>(block_rows_ * score_stride_);  // NOTE: a row stride that is a multiple of 2 KiB would thrash L1
    row_max_ = arena_.take<float>(rows_per_task);
    row_sum_ = arena_.take<float>(rows_per_task);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, 16) + 16 : 0);
    keep_bits_ = arena_.take<uint16_t>(problem.dropout_threshold ? block_rows_ * kKeepWords : 0);
    started_ = arena_.take<uint8_t>((rows_per_task + block_rows_ - 1) / block_rows_);
    if (problem.row_tiles.data) tile_kinds_ = arena_.take<uint8_t>((rows_per_task + 63) / 64 * problem.row_tiles.num_tiles);
  }

  size_t scratch_bytes() const { return arena_.used(); }
  int64_t num_tasks() const { return problem_.batch * problem_.num_heads * tasks_per_head_; }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task) {
      set_task(task);
      const int64_t rows_present = has_few_rows() ? 0 : min_of(max_of(bounds_.seqlen_q - row0_, int64_t{0}), rows_);
      if (rows_present > 0) {
        pack_queries(rows_present);
        const int64_t first_key = first_visible_key(bounds_, row0_), keys_end = visible_keys(bounds_, row0_ + rows_present - 1);
        for (int64_t key0 = first_key / most_keys_ * most_keys_; key0 < keys_end; key0 += most_keys_) {
          if (!sees_any(rows_present, key0, min_of(most_keys_, keys_end - key0))) continue;
          pack_keys(key0);
          plan_prefetch(task, last_task, key0, keys_end, rows_present);
          for (int64_t row = 0; row < rows_present; row += block_rows_) attend(row, min_of(block_rows_, rows_present - row), key0);
        }
      }
      store_rows();
    }
  }

 private:
  static constexpr int64_t kKeepWords = kBlockKeys / 16;

  template <class U>
  U* query_row(const StridedTensor& tensor, int64_t row) const {
    return row_ptr<U>(tensor, batch_, head_, bounds_.first_query + row);
  }
  const T* key_row(const StridedTensor& tensor, int64_t key) const {
    return row_ptr<const T>(tensor, batch_, kv_head_, bounds_.first_key + key);
  }
  // The tile kinds for the task's rows from `row` on and keys from key0 on; null without a PreparedMask.
  const uint8_t* tile_kinds(int64_t row, int64_t key0) const {
    return tile_kinds_ ? tile_kinds_ + row / 64 * problem_.row_tiles.num_tiles + key0 / 64 : nullptr;
  }
  bool sees_any(int64_t rows, int64_t key0, int64_t keys) const {
    bool any = !tile_kinds_;
    for (int64_t row = 0; row < rows && !any; row += 64)
      for (int64_t j = 0; j < keys; j += 64) any |= tile_kinds(row, key0 + j)[0] != kEmptyTile;
    return any;
  }

  void set_task(int64_t task) {
    batch_head_ = task / tasks_per_head_;
    head_ = batch_head_ % problem_.num_heads;
    kv_head_ = key_head(problem_, head_);
    if (const int64_t b = batch_head_ / problem_.num_heads; b != batch_) {
      batch_ = b;
      bounds_ = sequence_bounds(problem_, b);
      if (problem_.key_mask) has_holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
    }
    row0_ = task % tasks_per_head_ * rows_per_task_;
    rows_ = min_of(rows_per_task_, bounds_.rows - row0_);
    softmax_.enter(bounds_, batch_, head_, has_holes_ ? key_bias_ : nullptr);
    const float sink = problem_.sinks ? problem_.sinks[head_] * kLog2e : -kInfinity;
    for (int64_t i = 0; i < rows_per_task_; i += kLanes) {
      const LaneMask present = first_lanes(sink == -kInfinity ? 0 : bounds_.seqlen_q - row0_ - i);
      store(row_max_ + i, select(present, broadcast(sink), broadcast(-kInfinity)));
      store(row_sum_ + i, select(present, broadcast(1.0f), broadcast(0.0f)));
    }
    for (int64_t row = 0; row < rows_; row += block_rows_) started_[row / block_rows_] = 0;
    for (int64_t row = 0; tile_kinds_ && row < rows_; row += 64)
      expand_tiles(problem_.row_tiles, batch_, head_, (row0_ + row) / 64, tile_kinds_ + row / 64 * problem_.row_tiles.num_tiles);
  }

  // With one block of keys, each query is read only once or twice, so float32 queries are read in place.
  void pack_queries(int64_t rows) {
    const T* source = query_row<const T>(problem_.query, row0_);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (problem_.seqlen_k <= most_keys_) {
        query_rows_ = source, query_stride_ = problem_.query.row;
        return;
      }
    }
    pack_rows(source, problem_.query.row, rows, problem_.head_dim_qk, packed_query_, dim_qk_);
    query_rows_ = packed_query_, query_stride_ = dim_qk_;
  }

  void pack_keys(int64_t key0) {
    const int64_t head = batch_ * problem_.num_heads_kv + kv_head_;
    if (packed_head_ == head && packed_key0_ == key0) return;
    packed_head_ = head, packed_key0_ = key0;
    const int64_t keys = min_of(most_keys_, bounds_.seqlen_k - key0);
    const float* absent = has_holes_ ? key_bias_ + key0 : nullptr;
    pack_transposed(key_row(problem_.key, key0), problem_.key.row, keys, problem_.head_dim_qk, key_t_, absent);
    pack_rows(key_row(problem_.value, key0), problem_.value.row, keys, problem_.head_dim_v, value_rows_, dim_v_, absent);
  }

  // Plans what to prefetch during this key block's products: the next key block, or what the next task reads and writes.
  void plan_prefetch(int64_t task, int64_t last_task, int64_t key0, int64_t keys_end, int64_t rows) {
    prefetcher_.clear();
    if (key0 + most_keys_ < keys_end) {
      prefetch_keys(batch_, kv_head_, bounds_.first_key + key0 + most_keys_, min_of(most_keys_, keys_end - key0 - most_keys_));
    } else if (task + 1 < last_task) {
      const int64_t next_head = (task + 1) / tasks_per_head_, part = task % tasks_per_head_,
                    row = (task + 1) % tasks_per_head_ * rows_per_task_;
      const int64_t b = next_head / problem_.num_heads, h = next_head % problem_.num_heads, query0 = first_query_of(problem_, b) + row,
                    next_rows = min_of(rows_per_task_, problem_.seqlen_q - row);
      prefetcher_.add_reads(row_ptr<const T>(problem_.query, b, h, query0), problem_.query.row * kSize, next_rows,
                            problem_.head_dim_qk * kSize);
      const auto writes = [&](const StridedTensor& result) {
        if (result.data)
          prefetcher_.add_writes(row_ptr<const T>(result, b, h, query0), result.row * kSize, next_rows, problem_.head_dim_v * kSize);
      };
      writes(problem_.out), writes(problem_.out_error);
      if (problem_.seqlen_k > most_keys_) {
        prefetch_keys(b, key_head(problem_, h), first_key_of(problem_, b), most_keys_);
      } else if ((batch_head_ + 1) * tasks_per_head_ < last_task) {  // each task of this head prefetches its share of the next head
        const int64_t following = batch_head_ + 1, begin = problem_.seqlen_k * part / tasks_per_head_,
                      end = problem_.seqlen_k * (part + 1) / tasks_per_head_, next_b = following / problem_.num_heads;
        prefetch_keys(next_b, key_head(problem_, following % problem_.num_heads), first_key_of(problem_, next_b) + begin, end - begin);
      }
    }
    const int64_t keys = min_of(most_keys_, keys_end - key0);
    prefetcher_.spread_over(matmul_ticks(rows, keys, problem_.head_dim_qk) + matmul_ticks(rows, dim_v_, keys));
  }

  void prefetch_keys(int64_t b, int64_t h_kv, int64_t key0, int64_t keys) {
    prefetcher_.add_reads(row_ptr<const T>(problem_.key, b, h_kv, key0), problem_.key.row * kSize, keys, problem_.head_dim_qk * kSize);
    prefetcher_.add_reads(row_ptr<const T>(problem_.value, b, h_kv, key0), problem_.value.row * kSize, keys, problem_.head_dim_v * kSize);
  }

  // Rows [row, row + rows) of the task attend to the keys they see in the packed block at key0.
  void attend(int64_t row, int64_t rows, int64_t key0) {
    const int64_t first_key = max_of(first_visible_key(bounds_, row0_ + row) - key0, int64_t{0}) / kKeyTile * kKeyTile,
                  keys_end = min_of(visible_keys(bounds_, row0_ + row + rows - 1) - key0, most_keys_);
    for_each_run(tile_kinds(row, key0), first_key, keys_end,
                 [&](int64_t first, int64_t last, bool mixed) { attend_run(row, rows, key0, first, last - first, mixed); });
  }

  // The same for keys [first, first + keys) of the block.
  void attend_run(int64_t row, int64_t rows, int64_t key0, int64_t first, int64_t keys, bool mixed) {
    const float* keys_t = key_t_ + first * problem_.head_dim_qk;
    for (int64_t j = 0; j < keys; j += kKeyTile)
      matmul(rows, min_of(kKeyTile, round_up(keys - j, kLanes)), problem_.head_dim_qk, query_rows_ + row * query_stride_, query_stride_, 1,
             keys_t + j * problem_.head_dim_qk, kKeyTile, scores_ + j, score_stride_, false, &prefetcher_);
    softmax_rows(row, rows, key0 + first, keys, mixed);
    uint8_t& started = started_[row / block_rows_];
    matmul(rows, dim_v_, keys, scores_, score_stride_, 1, value_rows_ + first * dim_v_, dim_v_, acc_ + row * dim_v_, dim_v_, started != 0,
           &prefetcher_);
    started = 1;
  }

  // Replaces scores_ by weights, for rows [row, row + rows) and `keys` keys from key0 on.
  void softmax_rows(int64_t row, int64_t rows, int64_t key0, int64_t keys, bool mixed) {
    if (problem_.dropout_threshold)
      dropout_keep_bits(problem_, batch_head_, row0_ + row, rows, key0, (keys + 15) / 16, keep_bits_, kKeepWords);
    softmax_.enter_block(row0_ + row, key0, keys, mixed);
    const bool started = started_[row / block_rows_] != 0;
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t line = i - row;
      const float rescale =
          softmax_.weights(row0_ + i, scores_ + line * score_stride_, row_max_[i], row_sum_[i], keep_bits_ + line * kKeepWords);
      if (started && rescale != 1.0f) scale_row(acc_ + i * dim_v_, rescale, dim_v_);
    }
  }

  bool has_few_rows() const { return bounds_.seqlen_q <= kFewRows; }  // FewRowsForward computes and stores the first kFewRows

  // Stores out and lse of the task's rows: 0 and -inf for rows that see nothing, including absent ones.
  void store_rows() {
    const int64_t first = has_few_rows() && row0_ == 0 ? kFewRows : 0;
    for (int64_t i = first; i < rows_; ++i) {
      const bool empty = row_sum_[i] == 0.0f || !started_[i / block_rows_];  // acc_ may be uninitialized
      T* const error = row_ptr_or_null<T>(problem_.out_error, batch_, head_, bounds_.first_query + row0_ + i);
      store_row(query_row<T>(problem_.out, row0_ + i), empty ? nullptr : acc_ + i * dim_v_, problem_.dropout_scale() / row_sum_[i],
                problem_.head_dim_v, error);
    }
    float* lse = problem_.lse + lse_offset(problem_, bounds_, batch_, head_) + row0_;
    for (int64_t i = first; i < rows_; i += kLanes) store_first(lse + i, natural_lse(load(row_max_ + i), load(row_sum_ + i)), rows_ - i);
  }

  static constexpr int64_t kSize = sizeof(T);
  const AttentionProblem& problem_;
  const int64_t block_rows_, rows_per_task_, tasks_per_head_, dim_qk_, dim_v_, most_keys_, score_stride_;
  Arena arena_;
  OnlineSoftmax softmax_;

  float* key_t_;                   // (tiles, head_dim_qk, kKeyTile), the key block transposed
  float* value_rows_;              // (keys, dim_v)
  float* packed_query_;            // (rows_per_task, dim_qk)
  float* acc_;                     // (rows_per_task, dim_v), not yet normalized
  float* scores_;                  // (block_rows, score_stride)
  float* row_max_;                 // (rows_per_task,) in log2 units
  float* row_sum_;                 // (rows_per_task,)
  float* key_bias_;                // (seqlen_k,) 0 or -inf
  uint16_t* keep_bits_;            // (block_rows, kKeepWords) dropout bits
  uint8_t* started_;               // per block of rows: whether acc_ holds something
  uint8_t* tile_kinds_ = nullptr;  // (rows_per_task / 64, tiles)

  int64_t batch_ = -1, head_ = 0, kv_head_ = 0, batch_head_ = 0, row0_ = 0, rows_ = 0;
  int64_t packed_head_ = -1, packed_key0_ = -1;
  const float* query_rows_ = nullptr;  // the task's queries, packed or in place
  int64_t query_stride_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

template <class T>
static Plan plan_forward(const AttentionProblem& problem, int num_threads) {
  if (problem.seqlen_q <= kFewRows) return FewRowsForward<T>::plan(problem, num_threads);
  const int64_t rows_per_task = forward_rows_per_task(problem, num_threads);
  const ForwardPass<T> pass(problem, rows_per_task, nullptr);
  return with_few_rows<T>(problem, {pass.num_tasks(), rows_per_task, pass.scratch_bytes()});
}

template <class T>
static void run_forward(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
  if (problem.seqlen_q <= kFewRows) return FewRowsForward<T>::run(problem, plan, first_task, last_task, scratch);
  ForwardPass<T> pass(problem, plan.task_size, scratch);
  pass.run(first_task, min_of(last_task, pass.num_tasks()));
  run_few_rows<T>(problem, pass.num_tasks(), first_task, last_task, scratch);
}

}  // namespace fused_attention::cpu::FA_ISA
