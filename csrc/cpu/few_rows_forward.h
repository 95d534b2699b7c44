// SPDX-License-Identifier: Apache-2.0
// Forward pass of sequences of at most kFewRows query rows, as in decoding. Every key is used only a few times, so memory is the
// bottleneck, and keys and values are read in place. A task covers some key heads of one sequence and the query heads that read them. It
// visits the keys in blocks of kBlockKeys, four keys of every head at a time: heads adjacent in memory then form long runs, which the
// hardware prefetcher follows and which share an address translation. For each block:
//   1. S = Q K^T          2. online softmax, line by line          3. O = O * rescale + P V
// A line is a row of a query head. Empty tiles of a PreparedMask are not read.
//
// Keys from kPartKeys on are parts of their own: each part has its own softmax and O, and these are merged in the order of the keys. So the
// result has the same bits whether one task visits all parts or, if there are fewer heads than threads, each part is a task.
//
// 8-bit keys and values are widened in registers. What makes them numbers, a factor for each block of keys, multiplies S and P instead.
#pragma once
#include "dropout.h"
#include "kernel_table.h"
#include "matmul.h"
#include "online_softmax.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBlockKeys = 512, kPartKeys = 2048;

// How many key heads of a problem with few rows a task covers: as many as leave each thread four tasks, of at most kMostLines lines.
static int64_t few_rows_heads_per_task(const AttentionProblem& problem, int num_threads) {
  constexpr int64_t kMostLines = 32;
  const int64_t lines_per_head = problem.num_heads / max_of(problem.num_heads_kv, int64_t{1}) * problem.seqlen_q,
                wanted_tasks = 4 * int64_t{num_threads};
  int64_t heads = max_of(problem.num_heads_kv, int64_t{1});
  while (heads > 1 && (heads * lines_per_head > kMostLines || problem.batch * ((problem.num_heads_kv + heads - 1) / heads) < wanted_tasks))
    heads = (heads + 1) / 2;
  return heads;
}

// T: what keys and values are stored as; also queries and out, unless these are 8-bit numbers.
template <class T>
class FewRowsForward {
 public:
  // heads_per_task: counted in key heads. key_parts: tasks that share the keys, with memory `shared`; 1 = none does.
  FewRowsForward(const AttentionProblem& problem, int64_t heads_per_task, char* scratch, int64_t key_parts = 1, char* shared = nullptr)
      : problem_(problem),
        heads_per_task_(heads_per_task),
        tasks_per_sequence_((problem.num_heads_kv + heads_per_task - 1) / heads_per_task),
        key_parts_(key_parts),
        group_(problem.num_heads / problem.num_heads_kv),
        lines_per_head_(min_of(problem.seqlen_q, kFewRows)),
        dim_qk_(round_up(problem.head_dim_qk, 16)),
        dim_v_(round_up(problem.head_dim_v, 16)),
        score_stride_(min_of(kBlockKeys, round_up(problem.seqlen_k, 16)) + 16),
        arena_(scratch),
        softmax_(problem, arena_, score_stride_) {
    const int64_t lines = heads_per_task * group_ * lines_per_head_;
    query_rows_ = arena_.take<float>(lines * dim_qk_);
    whole_ = arena_.take<float>(state_floats());
    part_ = arena_.take<float>(key_parts == 1 && problem.seqlen_k > kPartKeys ? state_floats() : 0);
    scores_ = arena_.take<float>(lines * score_stride_);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, 16) + 16 : 0);
    if constexpr (kQuantized) factors_ = arena_.take<float>(score_stride_);
    zero_row_ = arena_.take<T>(max_of(problem.head_dim_qk, problem.head_dim_v));
    keep_bits_ = arena_.take<uint16_t>(problem.dropout_threshold ? 16 * kKeepWords : 0);  // bits are drawn for 16 rows at a time
    if (problem.row_tiles.data) tile_kinds_ = arena_.take<uint8_t>(heads_per_task * group_ * problem.row_tiles.num_tiles);
    if (key_parts == 1) return;
    Arena arena(shared);
    const int64_t units = problem.batch * tasks_per_sequence_;
    finished_ = arena.take<int64_t>(units);
    shared_parts_ = arena.take<float>(units * key_parts * state_floats());
    shared_bytes_ = arena.used();
  }

  static Plan plan(const AttentionProblem& problem, int num_threads) {
    const int64_t heads = few_rows_heads_per_task(problem, num_threads);
    const int64_t tasks = problem.batch * ((problem.num_heads_kv + heads - 1) / heads);
    const int64_t key_parts = tasks < num_threads ? max_of((problem.seqlen_k + kPartKeys - 1) / kPartKeys, int64_t{1}) : 1;
    const FewRowsForward pass(problem, heads, nullptr, key_parts);
    return {pass.num_tasks(), heads, pass.scratch_bytes(), key_parts, pass.shared_bytes_};
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    FewRowsForward(problem, plan.task_size, scratch, plan.key_parts, plan.shared).run(first_task, last_task);
  }

  int64_t num_tasks() const { return problem_.batch * tasks_per_sequence_ * key_parts_; }
  size_t scratch_bytes() const { return arena_.used(); }

  void run(int64_t first_task, int64_t last_task) {
    __builtin_memset(zero_row_, 0, static_cast<size_t>(max_of(problem_.head_dim_qk, problem_.head_dim_v)) * sizeof(T));
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t unit = task / key_parts_, part = task % key_parts_;
      enter_sequence(unit / tasks_per_sequence_);
      if (bounds_.seqlen_q > kFewRows) continue;
      set_task(unit);
      if (key_parts_ == 1) {
        attend_part(0, whole_);
        for (int64_t later = 1; later * kPartKeys < bounds_.seqlen_k; ++later) {
          attend_part(later, part_);
          merge(whole_, part_);
        }
        store_rows(whole_);
        continue;
      }
      float* parts = shared_parts_ + unit * key_parts_ * state_floats();
      attend_part(part, parts + part * state_floats());
      if (__atomic_add_fetch(finished_ + unit, 1, __ATOMIC_ACQ_REL) < key_parts_) continue;
      for (int64_t later = 1; later < key_parts_; ++later) merge(parts, parts + later * state_floats());
      store_rows(parts);
    }
  }

 private:
  static constexpr int64_t kKeepWords = kBlockKeys / 16, kRowsAhead = 32, kSize = sizeof(T);
  static constexpr bool kQuantized = sizeof(T) == 1;

  int64_t first_line(int64_t head) const { return head * lines_per_head_; }  // head: a query head of the task

  // Calls visit with a number of the type that queries and out are stored as.
  template <class Visit>
  FA_MEMBER_INLINE void with_query_type(Visit&& visit) const {
    if constexpr (!kQuantized)
      visit(T{});
    else if (problem_.dtype == Dtype::float32)
      visit(float{});
    else if (problem_.dtype == Dtype::bfloat16)
      visit(bfloat16_t{});
    else
      visit(float16_t{});
  }

  void enter_sequence(int64_t b) {
    if (b == batch_) return;
    batch_ = b;
    bounds_ = sequence_bounds(problem_, b);
    if (problem_.key_mask) has_holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
  }

  void set_task(int64_t task) {
    rows_ = bounds_.seqlen_q;
    head0_ = task % tasks_per_sequence_ * heads_per_task_;
    heads_ = min_of(heads_per_task_, problem_.num_heads_kv - head0_);
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head, line0 = first_line(head);
      with_query_type([&](auto type) FA_LAMBDA_INLINE {
        pack_rows(row_ptr<const decltype(type)>(problem_.query, batch_, h, bounds_.first_query), problem_.query.row, rows_,
                  problem_.head_dim_qk, query_rows_ + line0 * dim_qk_, dim_qk_);
      });
      if (tile_kinds_) expand_tiles(problem_.row_tiles, batch_, h, 0, tile_kinds_ + head * problem_.row_tiles.num_tiles);
    }
  }

  // A state: row_max and row_sum of the lines, then acc_.
  int64_t padded_lines() const { return round_up(heads_per_task_ * group_ * lines_per_head_, kLanes) + kLanes; }
  int64_t state_floats() const { return round_up(2 * padded_lines() + heads_per_task_ * group_ * lines_per_head_ * dim_v_, 16); }
  void use(float* state) { row_max_ = state, row_sum_ = state + padded_lines(), acc_ = state + 2 * padded_lines(); }

  // Fills a state from one part of the keys, which may be empty. The first has the sink.
  void attend_part(int64_t part, float* state) {
    use(state);
    for (int64_t head = 0; head < heads_ * group_; ++head)
      for (int64_t i = 0; i < lines_per_head_; ++i) {
        const float sink = problem_.sinks && part == 0 && i < rows_ ? problem_.sinks[head0_ * group_ + head] : -kInfinity;
        row_max_[first_line(head) + i] = sink * kLog2e;
        row_sum_[first_line(head) + i] = sink != -kInfinity ? 1.0f : 0.0f;
      }
    for (int64_t i = 0; i < heads_ * group_ * lines_per_head_ * dim_v_; i += kLanes) store(acc_ + i, broadcast(0.0f));
    if (rows_ == 0) return;
    const int64_t first = max_of(first_visible_key(bounds_, 0) / 64 * 64, part * kPartKeys),
                  end = min_of(visible_keys(bounds_, rows_ - 1), (part + 1) * kPartKeys);
    for (int64_t key0 = first; key0 < end; key0 += kBlockKeys) attend(key0, min_of(kBlockKeys, end - key0));
  }

  // Adds the state of later keys to that of earlier ones.
  void merge(float* earlier, float* later) {
    use(earlier);
    const float *later_max = later, *later_sum = later + padded_lines(), *later_acc = later + 2 * padded_lines();
    for (int64_t head = 0; head < heads_ * group_; ++head)
      for (int64_t line = first_line(head); line < first_line(head) + rows_; ++line) {
        if (later_sum[line] == 0.0f) continue;
        const float max = max_of(row_max_[line], later_max[line]);
        const float shrink = row_sum_[line] == 0.0f ? 0.0f : __builtin_exp2f(row_max_[line] - max),
                    shrink_later = __builtin_exp2f(later_max[line] - max);
        row_max_[line] = max;
        row_sum_[line] = row_sum_[line] * shrink + later_sum[line] * shrink_later;
        for (int64_t d = line * dim_v_; d < (line + 1) * dim_v_; d += kLanes)
          store(acc_ + d, fmadd(load(later_acc + d), broadcast(shrink_later), mul(load(acc_ + d), broadcast(shrink))));
      }
  }

  uint8_t tile_kind(int64_t head, int64_t key) const {
    return tile_kinds_ ? tile_kinds_[head * problem_.row_tiles.num_tiles + key / 64] : static_cast<uint8_t>(kFullTile);
  }

  void attend(int64_t key0, int64_t keys) {
    visit_keys(problem_.key, problem_.value, key0, keys, problem_.head_dim_qk, [&](int64_t line, int64_t j, const T* const rows[4]) {
      dot_products<1>(query_rows_ + line * dim_qk_, 0, rows, problem_.head_dim_qk, scores_ + line * score_stride_ + j, 0);
    });
    if constexpr (kQuantized) multiply_scores(problem_.key_scale, key0, keys);
    softmax(key0, keys);
    if constexpr (kQuantized) multiply_scores(problem_.value_scale, key0, keys);
    visit_keys(problem_.value, problem_.key, key0, keys, problem_.head_dim_v, [&](int64_t line, int64_t j, const T* const rows[4]) {
      add_weighted(acc_ + line * dim_v_, scores_ + line * score_stride_ + j, rows, problem_.head_dim_v);
    });
  }

  // Calls visit(line, j, rows) for every line and every four keys from key0 + j on that its head may see. rows point into `tensor`, or to
  // zeros for keys that are absent or past the block. next: the tensor that is read after this block.
  template <class Visit>
  FA_MEMBER_INLINE void visit_keys(const StridedTensor& tensor, const StridedTensor& next, int64_t key0, int64_t keys, int64_t head_dim,
                                   Visit&& visit) {
    const T *first = row_ptr<const T>(tensor, batch_, head0_, bounds_.first_key + key0),
            *next_first = row_ptr<const T>(next, batch_, head0_, bounds_.first_key + key0);
    for (int64_t j = 0; j < keys; j += 4)
      for (int64_t head = 0; head < heads_; ++head) {
        bool seen = !tile_kinds_;
        for (int64_t member = 0; member < group_; ++member) seen |= tile_kind(head * group_ + member, key0 + j) != kEmptyTile;
        if (!seen) continue;
        const int64_t ahead = j + kRowsAhead;
        const T* line = ahead < keys ? first + ahead * tensor.row + head * tensor.head
                                     : next_first + min_of(ahead - keys, keys - 1) * next.row + head * next.head;
        const int64_t next_line = ahead < keys ? tensor.row : next.row;  // a prefetch past the last key does no harm
        const T* row = first + j * tensor.row + head * tensor.head;
        const T* rows[4];
        for (int64_t n = 0; n < 4; ++n, row += tensor.row, line += next_line) {
          for (int64_t d = 0; d < head_dim; d += 64 / kSize) __builtin_prefetch(line + d, 0, 2);
          rows[n] = row;
        }
        if (has_holes_ || j + 4 > keys)
          for (int64_t n = 0; n < 4; ++n)
            if (j + n >= keys || (has_holes_ && is_absent(key_bias_, key0 + j + n))) rows[n] = zero_row_;
        for (int64_t member = head * group_; member < (head + 1) * group_; ++member)
          if (tile_kind(member, key0 + j) != kEmptyTile)
            for (int64_t i = 0; i < rows_; ++i) visit(first_line(member) + i, j, rows);
      }
  }

  // Multiplies scores_, or the weights they have become, by the factors of their keys: 0 for absent keys, whose factors may be NaN.
  void multiply_scores(const BlockScales& scales, int64_t key0, int64_t keys) {
    for (int64_t head = 0; head < heads_; ++head) {
      const float* scale = scales.data + batch_ * scales.batch + (head0_ + head) * scales.head + key0 / scales.keys * scales.block;
      if (scales.keys == 1)
        for (int64_t j = 0; j < keys; ++j) factors_[j] = scale[j * scales.block] * kLoadFactor<T>;
      else
        for (int64_t j = 0, end = scales.keys - key0 % scales.keys; j < keys; end += scales.keys, scale += scales.block)
          for (const float factor = *scale * kLoadFactor<T>; j < min_of(end, keys); ++j) factors_[j] = factor;
      for (int64_t j = 0; has_holes_ && j < keys; ++j)
        if (is_absent(key_bias_, key0 + j)) factors_[j] = 0.0f;
      for (int64_t j = keys; j < round_up(keys, kLanes); ++j) factors_[j] = 0.0f;
      for (int64_t member = head * group_; member < (head + 1) * group_; ++member)
        for (int64_t line = first_line(member); line < first_line(member) + rows_; ++line)
          for (int64_t j = 0; j < keys; j += kLanes) {
            float* score = scores_ + line * score_stride_ + j;
            store(score, mul(load(score), load(factors_ + j)));
          }
    }
  }

  // Replaces scores_ by weights. Scores of a PreparedMask's empty tiles were not computed, but their bits are 0.
  void softmax(int64_t key0, int64_t keys) {
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head;
      bool mixed = false;
      for (int64_t j = 0; j < keys; j += 64) mixed |= tile_kind(head, key0 + j) != kFullTile;
      if (problem_.dropout_threshold)
        dropout_keep_bits(problem_, batch_ * problem_.num_heads + h, 0, rows_, key0, (keys + 15) / 16, keep_bits_, kKeepWords);
      softmax_.enter(bounds_, batch_, h, has_holes_ ? key_bias_ : nullptr);
      softmax_.enter_block(0, key0, keys, mixed);
      for (int64_t i = 0; i < rows_; ++i) {
        const int64_t line = first_line(head) + i;
        const float rescale =
            softmax_.weights(i, scores_ + line * score_stride_, row_max_[line], row_sum_[line], keep_bits_ + i * kKeepWords);
        if (rescale != 1.0f) scale_row(acc_ + line * dim_v_, rescale, dim_v_);
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

  // Stores out and lse of the first kFewRows rows: 0 and -inf for rows that see nothing, including absent ones.
  void store_rows(float* state) {
    use(state);
    const int64_t rows = min_of(bounds_.rows, kFewRows);
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      const int64_t h = head0_ * group_ + head, line0 = first_line(head);
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = row_sum_[line0 + i];
        with_query_type([&](auto type) FA_LAMBDA_INLINE {
          using Stored = decltype(type);
          store_row(row_ptr<Stored>(problem_.out, batch_, h, bounds_.first_query + i), sum == 0.0f ? nullptr : acc_ + (line0 + i) * dim_v_,
                    problem_.dropout_scale() / sum, problem_.head_dim_v,
                    row_ptr_or_null<Stored>(problem_.out_error, batch_, h, bounds_.first_query + i));
        });
      }
      const Vec sums = select(first_lanes(rows), load(row_sum_ + line0), broadcast(1.0f));  // unset past the last line
      store_first(problem_.lse + lse_offset(problem_, bounds_, batch_, h), natural_lse(load(row_max_ + line0), sums), rows);
    }
  }

  const AttentionProblem& problem_;
  const int64_t heads_per_task_, tasks_per_sequence_, key_parts_;
  const int64_t group_;  // query heads per key head
  const int64_t lines_per_head_, dim_qk_, dim_v_, score_stride_;
  Arena arena_;
  OnlineSoftmax softmax_;

  float* query_rows_;                              // (lines, dim_qk)
  float *whole_, *part_;                           // states
  float* acc_ = nullptr;                           // (lines, dim_v) of the state in use, not yet normalized
  float* scores_;                                  // (lines, score_stride)
  float *row_max_ = nullptr, *row_sum_ = nullptr;  // (lines,) likewise, maxima in log2 units
  float* key_bias_;                                // (seqlen_k,) 0 or -inf
  float* factors_ = nullptr;                       // (score_stride,) of keys or values stored as 8-bit numbers
  T* zero_row_;                                    // (head_dim,)
  uint16_t* keep_bits_;                            // (16, kKeepWords) dropout bits of one head
  uint8_t* tile_kinds_ = nullptr;                  // (query heads, tiles)

  // Shared by all threads if parts of the keys are tasks.
  int64_t* finished_ = nullptr;    // (units,) parts so far, of the key heads that a task covers without parts
  float* shared_parts_ = nullptr;  // (units, key_parts) states
  size_t shared_bytes_ = 0;

  int64_t batch_ = -1, head0_ = 0, heads_ = 0, rows_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
};

template <class T>
static Plan plan_quantized_forward(const AttentionProblem& problem, int num_threads) {
  return FewRowsForward<T>::plan(problem, num_threads);
}

template <class T>
static void run_quantized_forward(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
  FewRowsForward<T>::run(problem, plan, first_task, last_task, scratch);
}

// In a batch with longer sequences, those with few rows get tasks of FewRowsForward, after the tasks of the kernel for longer ones. So what
// a sequence gets does not depend on the others, and a decoding step next to a prompt costs what it costs alone.
template <class T>
static Plan with_few_rows(const AttentionProblem& problem, Plan plan) {
  bool any = false;
  for (int64_t b = 0; (problem.cu_seqlens_q || problem.query_lengths) && b < problem.batch && !any; ++b)
    any = sequence_bounds(problem, b).seqlen_q <= kFewRows;
  if (!any) return plan;
  const FewRowsForward<T> pass(problem, 1, nullptr);
  return {plan.num_tasks + pass.num_tasks(), plan.task_size,
          plan.scratch_bytes > pass.scratch_bytes() ? plan.scratch_bytes : pass.scratch_bytes()};
}

// num_longer: the tasks that come before.
template <class T>
static void run_few_rows(const AttentionProblem& problem, int64_t num_longer, int64_t first_task, int64_t last_task, char* scratch) {
  if (last_task > num_longer)
    FewRowsForward<T>(problem, 1, scratch).run(max_of(first_task - num_longer, int64_t{0}), last_task - num_longer);
}

}  // namespace fused_attention::cpu::FA_ISA
