// SPDX-License-Identifier: Apache-2.0
// Backward pass of sequences of at most kFewRows query rows. As in few_rows_forward.h, a task covers some key heads of one sequence, and
// reads keys and values in place, four keys of every head at a time. For each block of kKeyTile keys:
//
//   1. S = Q K^T,  dP = dout V^T                       key by key
//   2. P and dS                                        line by line: softmax_gradient.h
//   3. dK = dS^T Q,  dV = dropout(P)^T dout            key by key, each written once: sums over the lines of a head stay in registers
//      dQ += dS K                                      in scratch
//
// A line is a row of a query head. dQ and the gradients of slopes are summed by parts of the keys, as in backward.h.
#pragma once
#include "backward_tasks.h"
#include "few_rows_forward.h"
#include "softmax_gradient.h"

namespace fused_attention::cpu::FA_ISA {

template <class T>
class FewRowsBackward {
 public:
  FewRowsBackward(const AttentionProblem& problem, int64_t heads_per_task, Arena& arena)
      : problem_(problem),
        tasks_(problem, heads_per_task),
        group_(problem.num_heads / max_of(problem.num_heads_kv, int64_t{1})),
        prefetching_(problem.key.row != problem.head_dim_qk),
        lines_(heads_per_task * group_ * min_of(problem.seqlen_q, kFewRows)),
        dim_qk_(round_up(problem.head_dim_qk, 16)),
        dim_v_(round_up(problem.head_dim_v, 16)),
        softmax_(problem, arena, lines_) {
    query_rows_ = arena.take<float>(lines_ * dim_qk_);
    dout_rows_ = arena.take<float>(lines_ * dim_v_);
    dquery_sum_ = arena.take<float>(lines_ * dim_qk_);
    dquery_part_ = arena.take<float>(problem.num_key_parts > 1 ? lines_ * dim_qk_ : 0);
    lse_ = arena.take<float>(lines_);
    delta_ = arena.take<float>(lines_);
    slope_sums_ = arena.take<double>(heads_per_task * group_);
    key_bias_ = arena.take<float>(problem.key_mask ? round_up(problem.seqlen_k, kKeyTile) : 0);
    zero_row_ = arena.take<T>(max_of(problem.head_dim_qk, problem.head_dim_v));
    unwanted_row_ = arena.take<T>(max_of(problem.head_dim_qk, problem.head_dim_v));
    if (problem.row_tiles.data) tile_kinds_ = arena.take<uint8_t>(heads_per_task * group_ * problem.row_tiles.num_tiles);
  }

  static Plan plan(const AttentionProblem& problem, int num_threads) {
    // Heads that are not adjacent in memory go one by one: together they would be more streams than the hardware prefetcher follows.
    const int64_t heads = problem.key.head < problem.key.row ? few_rows_heads_per_task(problem, num_threads) : 1;
    Arena arena(nullptr);
    const FewRowsBackward pass(problem, heads, arena);
    return {pass.tasks_.count(), heads, arena.used()};
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    Arena arena(scratch);
    FewRowsBackward pass(problem, plan.task_size, arena);
    for (int64_t task = first_task; task < last_task; ++task)
      pass.tasks_.for_each_head(task, [&](int64_t b, int64_t h_kv, bool) { pass.run_key_heads(task, b, h_kv); });
  }

  // The key heads of a task from h_kv on, and the query heads that read them.
  void run_key_heads(int64_t task, int64_t b, int64_t h_kv) {
    enter_sequence(b);
    head0_ = h_kv, heads_ = tasks_.heads_from(h_kv);
    const Range parts = tasks_.parts(task, bounds_.seqlen_k);
    if (parts.first == parts.last) return;
    for (int64_t head = 0; head < heads_ * group_; ++head) enter_head(head);
    for (int64_t part = parts.first; part < parts.last; ++part) {
      const Range keys = tasks_.keys({part, part + 1}, bounds_.seqlen_k);
      dquery_ = part == parts.first ? dquery_sum_ : dquery_part_;
      for (int64_t i = 0; i < lines_ * dim_qk_; i += kLanes) store(dquery_ + i, broadcast(0.0f));
      for (int64_t head = 0; head < heads_ * group_; ++head) slope_sums_[head] = 0;
      for (int64_t key0 = keys.first; key0 < keys.last; key0 += kKeyTile) attend(task, part, key0, min_of(kKeyTile, keys.last - key0));
      for (int64_t i = 0; part > parts.first && i < lines_ * dim_qk_; i += kLanes)
        store(dquery_sum_ + i, add(load(dquery_sum_ + i), load(dquery_part_ + i)));
      for (int64_t head = 0; head < heads_ * group_; ++head)
        store_head_gradients(problem_, bounds_, batch_, query_head(head), part, delta_ + first_line(head),
                             static_cast<float>(slope_sums_[head]));
    }
    store_dquery(parts.first);
    if (tasks_.keys(parts, bounds_.seqlen_k).last == bounds_.seqlen_k) store_zeros(bounds_.seqlen_k, bounds_.keys);
  }

 private:
  static constexpr int64_t kRowsAhead = 32, kGradientsAhead = 16, kSize = sizeof(T), kStride = SoftmaxGradient::kScoreStride;

  int64_t query_head(int64_t head) const { return head0_ * group_ + head; }  // head: a query head of the task
  int64_t first_line(int64_t head) const { return head * rows_; }
  T* query_row(const StridedTensor& tensor, int64_t head, int64_t row) const {
    return row_ptr<T>(tensor, batch_, query_head(head), bounds_.first_query + row);
  }
  T* key_row(const StridedTensor& tensor, int64_t head, int64_t key) const {  // head: a key head of the task
    return row_ptr<T>(tensor, batch_, head0_ + head, bounds_.first_key + key);
  }

  void enter_sequence(int64_t b) {
    if (b == batch_) return;
    batch_ = b;
    bounds_ = sequence_bounds(problem_, b);
    rows_ = bounds_.seqlen_q;
    has_holes_ = problem_.key_mask && fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, kKeyTile));
    for (int64_t d = 0; d < max_of(problem_.head_dim_qk, problem_.head_dim_v); ++d) zero_row_[d] = T{};
  }

  // Packs Q and dout, and computes delta.
  void enter_head(int64_t head) {
    const int64_t h = query_head(head), line0 = first_line(head), offset = lse_offset(problem_, bounds_, batch_, h);
    if (tile_kinds_) expand_tiles(problem_.row_tiles, batch_, h, 0, tile_kinds_ + head * problem_.row_tiles.num_tiles);
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t line = line0 + i;
      lse_[line] = problem_.lse[offset + i];
      const bool sees_nothing = lse_[line] == -kInfinity;  // then it may hold garbage, and zeros take its place
      const float absent = sees_nothing ? -kInfinity : 0.0f;
      pack_rows<T>(query_row(problem_.query, head, i), 0, 1, problem_.head_dim_qk, query_rows_ + line * dim_qk_, dim_qk_, &absent);
      pack_rows<T>(query_row(problem_.dout, head, i), 0, 1, problem_.head_dim_v, dout_rows_ + line * dim_v_, dim_v_, &absent);
      delta_[line] = sees_nothing ? 0.0f : row_delta<T>(problem_, bounds_, batch_, h, i, dout_rows_ + line * dim_v_);
    }
  }

  uint8_t tile_kind(int64_t head, int64_t key) const {
    return tile_kinds_ ? tile_kinds_[head * problem_.row_tiles.num_tiles + key / kKeyTile] : static_cast<uint8_t>(kFullTile);
  }

  // Whether a row of some head may see one of the keys from key0 on.
  bool is_seen(int64_t key0) const {
    if (rows_ == 0 || key0 >= visible_keys(bounds_, rows_ - 1) || key0 + kKeyTile <= first_visible_key(bounds_, 0)) return false;
    bool seen = false;
    for (int64_t head = 0; head < heads_ * group_; ++head) seen |= tile_kind(head, key0) != kEmptyTile;
    return seen;
  }

  // One block of keys, within a tile of 64.
  void attend(int64_t task, int64_t part, int64_t key0, int64_t keys) {
    if (!is_seen(key0)) return store_zeros(key0, key0 + keys);
    float *weights = softmax_.weights(), *dscores = softmax_.dscores();
    for (int64_t j = 0; j < keys; j += 4)
      for (int64_t head = 0; head < heads_; ++head) {
        const T *key[4], *value[4];
        for (int64_t n = 0; n < 4; ++n) {
          if (prefetching_) prefetch(head, key0 + j + n);
          const bool present = is_present(key0, keys, j + n);
          key[n] = present ? key_row(problem_.key, head, key0 + j + n) : zero_row_;
          value[n] = present ? key_row(problem_.value, head, key0 + j + n) : zero_row_;
        }
        store_dot_products(lines_of(head), query_rows_, dim_qk_, key, problem_.head_dim_qk, weights + j);
        store_dot_products(lines_of(head), dout_rows_, dim_v_, value, problem_.head_dim_v, dscores + j);
      }
    for (int64_t head = 0; head < heads_ * group_; ++head) apply_softmax(task, part, head, key0, keys);
    for (int64_t j = 0; j < keys; j += 4)
      for (int64_t head = 0; head < heads_; ++head) {
        const T* key[4];
        T *dkey[4], *dvalue[4];
        for (int64_t n = 0; n < 4; ++n) {
          const bool present = is_present(key0, keys, j + n);
          key[n] = present ? key_row(problem_.key, head, key0 + j + n) : zero_row_;
          dkey[n] = present ? key_row(problem_.dkey, head, key0 + j + n) : unwanted_row_;
          dvalue[n] = present ? key_row(problem_.dvalue, head, key0 + j + n) : unwanted_row_;
          if (!present && j + n < keys) store_zeros_of_key(head, key0 + j + n);
          prefetch_gradients(head, key0 + j + n);
        }
        add_to_queries(lines_of(head), dscores + j, key);
        store_products(lines_of(head), dscores + j, query_rows_, dim_qk_, problem_.head_dim_qk, problem_.softmax_scale, dkey);
        store_products(lines_of(head), weights + j, dout_rows_, dim_v_, problem_.head_dim_v, problem_.dropout_scale(), dvalue);
      }
  }

  bool is_present(int64_t key0, int64_t keys, int64_t j) const { return j < keys && !(has_holes_ && is_absent(key_bias_, key0 + j)); }

  Range lines_of(int64_t head) const { return {first_line(head * group_), first_line((head + 1) * group_)}; }  // head: a key head

  // scores (lines, 4) = rows (lines, stride) . b[n]
  static void store_dot_products(Range lines, const float* rows, int64_t stride, const T* const b[4], int64_t head_dim, float* scores) {
    int64_t line = lines.first;
    for (; line + 2 <= lines.last; line += 2) dot_products<2>(rows + line * stride, stride, b, head_dim, scores + line * kStride, kStride);
    if (line < lines.last) dot_products<1>(rows + line * stride, stride, b, head_dim, scores + line * kStride, kStride);
  }

  // Prefetches a later key, which is too far from this one for the hardware prefetcher.
  void prefetch(int64_t head, int64_t key) const {
    const int64_t ahead = min_of(key + kRowsAhead, bounds_.seqlen_k - 1);
    const T *key_ahead = key_row(problem_.key, head, ahead), *value_ahead = key_row(problem_.value, head, ahead);
    for (int64_t d = 0; d < problem_.head_dim_qk; d += 64 / kSize) __builtin_prefetch(key_ahead + d, 0, 2);
    for (int64_t d = 0; d < problem_.head_dim_v; d += 64 / kSize) __builtin_prefetch(value_ahead + d, 0, 2);
  }

  // Prefetches what later gradients overwrite.
  void prefetch_gradients(int64_t head, int64_t key) const {
    const int64_t ahead = min_of(key + kGradientsAhead, bounds_.seqlen_k - 1);
    const T *dkey = key_row(problem_.dkey, head, ahead), *dvalue = key_row(problem_.dvalue, head, ahead);
    for (int64_t d = 0; d < problem_.head_dim_qk; d += 64 / kSize) __builtin_prefetch(dkey + d, 1, 2);
    for (int64_t d = 0; d < problem_.head_dim_v; d += 64 / kSize) __builtin_prefetch(dvalue + d, 1, 2);
  }

  // Products of a query head's lines -> weights and dS, 0 in an empty tile.
  void apply_softmax(int64_t task, int64_t part, int64_t head, int64_t key0, int64_t keys) {
    const int64_t h = query_head(head), line0 = first_line(head);
    const uint8_t kind = tile_kind(head, key0);
    if (kind == kEmptyTile) {
      for (int64_t i = line0 * kStride; i < (line0 + rows_) * kStride; i += kLanes) {
        store(softmax_.weights() + i, broadcast(0.0f));
        store(softmax_.dscores() + i, broadcast(0.0f));
      }
      return;
    }
    float* dmask = tasks_.mask_gradient(task, part);
    if (dmask) dmask += batch_ * problem_.dattn_mask_batch + h * problem_.dattn_mask_head;
    softmax_.enter(bounds_, batch_, h, has_holes_ ? key_bias_ : nullptr, dmask);
    for (int64_t i = 0; i < rows_; ++i)
      if (lse_[line0 + i] == -kInfinity)
        softmax_.enter_row_that_sees_nothing(i);
      else
        softmax_.enter_row(i, lse_[line0 + i], delta_[line0 + i]);
    softmax_.apply(0, rows_, key0, keys, kind == kMixedTile, line0);
    slope_sums_[head] += softmax_.dslope();
  }

  // dQ += dS K for four keys. dscores: (lines, 4).
  void add_to_queries(Range lines, const float* dscores, const T* const key[4]) const {
    const int64_t head_dim = problem_.head_dim_qk, stride = dim_qk_;
    float* const dquery = dquery_;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec from[4];
      for (int n = 0; n < 4; ++n) from[n] = d + kLanes <= head_dim ? load(key[n] + d) : load_first(key[n] + d, head_dim - d);
      for (int64_t line = lines.first; line < lines.last; ++line) {
        float* to = dquery + line * stride + d;
        Vec sum = load(to);
        for (int n = 0; n < 4; ++n) sum = fmadd(broadcast(dscores[line * kStride + n]), from[n], sum);
        store(to, sum);
      }
    }
  }

  // to (4, head_dim) = factor * scores^T rows, summed over the lines. scores: (lines, 4); rows: (lines, stride).
  static void store_products(Range lines, const float* scores, const float* rows, int64_t stride, int64_t head_dim, float factor,
                             T* const to[4]) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
      for (int64_t line = lines.first; line < lines.last; ++line) {
        const Vec row = load(rows + line * stride + d);
        for (int n = 0; n < 4; ++n) sums[n] = fmadd(broadcast(scores[line * kStride + n]), row, sums[n]);
      }
      for (int n = 0; n < 4; ++n) {
        const Vec gradient = mul(sums[n], broadcast(factor));
        if (d + kLanes <= head_dim)
          store(to[n] + d, gradient);
        else
          store_first(to[n] + d, gradient, head_dim - d);
      }
    }
  }

  // dK and dV of keys that no row sees.
  void store_zeros(int64_t first_key, int64_t last_key) const {
    for (int64_t key = first_key; key < last_key; ++key)
      for (int64_t head = 0; head < heads_; ++head) store_zeros_of_key(head, key);
  }
  void store_zeros_of_key(int64_t head, int64_t key) const {
    store_row(key_row(problem_.dkey, head, key), nullptr, 0.0f, problem_.head_dim_qk);
    store_row(key_row(problem_.dvalue, head, key), nullptr, 0.0f, problem_.head_dim_v);
  }

  // Stores dQ, or only the part that this task computes.
  void store_dquery(int64_t part) const {
    const bool shared = problem_.dquery_parts != nullptr;
    for (int64_t head = 0; head < heads_ * group_; ++head) {
      for (int64_t i = 0; i < rows_; ++i) {
        const float* sum = dquery_sum_ + (first_line(head) + i) * dim_qk_;
        if (shared)
          store_row(tasks_.dquery_part(part, bounds_, batch_, query_head(head)) + i * problem_.head_dim_qk, sum, 1.0f,
                    problem_.head_dim_qk);
        else
          store_row(query_row(problem_.dquery, head, i), sum, problem_.softmax_scale, problem_.head_dim_qk);
      }
      for (int64_t i = rows_; !shared && i < bounds_.rows; ++i)
        store_row(query_row(problem_.dquery, head, i), nullptr, 0.0f, problem_.head_dim_qk);
    }
  }

  const AttentionProblem& problem_;
  const BackwardTasks tasks_;
  const int64_t group_;     // query heads per key head
  const bool prefetching_;  // whether the keys of a head lie apart
  const int64_t lines_, dim_qk_, dim_v_;
  SoftmaxGradient softmax_;

  float *query_rows_, *dout_rows_;    // (lines, dim_qk), (lines, dim_v)
  float *dquery_sum_, *dquery_part_;  // (lines, dim_qk), over the parts of the keys so far, and from one part
  float* dquery_ = nullptr;           // one of the two: what the current part's dQ goes to
  float *lse_, *delta_;               // (lines,)
  double* slope_sums_;                // (query heads,) the gradients of slopes from the current part
  float* key_bias_;                   // (seqlen_k,) 0 or -inf
  T *zero_row_, *unwanted_row_;       // (head_dim,) in place of a key that is absent or past the block, and of its gradients
  uint8_t* tile_kinds_ = nullptr;     // (query heads, tiles)

  int64_t batch_ = -1, head0_ = 0, heads_ = 0, rows_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
};

}  // namespace fused_attention::cpu::FA_ISA
