// SPDX-License-Identifier: Apache-2.0
// Backward pass with float32 arithmetic; inputs and gradients are stored as float32, bfloat16 or float16. For each query head:
//
//   delta = rowsum(dout * (out + out_error)) - dlse                               (rows,)
//   for each block of keys, for each block of query rows that sees it:
//     S  = Q K^T,  dP = dout V^T                                                  (rows, keys), turned into P and dS: softmax_gradient.h
//     dV += dropout(P)^T dout,   dK += dS^T Q,   dQ += dS K                       dQ is held for the whole head
//
// Q, dout and dQ of the head are in float32 scratch (3 buffers of seqlen_q x head_dim, and a part of dQ if the keys are several parts),
// everything else in blocks of 64 x 64. Query heads that share a key head accumulate dK and dV in scratch. If the three buffers do not fit
// in L2, each block of rows visits several blocks of keys in turn. As in FlashAttention (Dao et al., 2022), with the lse gradient folded
// into delta: d lse / d S = P.
#pragma once
#include "backward_tasks.h"
#include "few_rows_backward.h"
#include "softmax_gradient.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBackwardRows = SoftmaxGradient::kRows, kBackwardKeys = kKeyTile;

// How many blocks of keys each block of rows visits in turn. One if Q, dout and dQ of a head, which every block of keys reads, mostly stay
// in L2, or if a diagonal limits which rows see which keys; otherwise as many as fit in part of L2, packed and with their gradients.
static int64_t key_blocks_together(const AttentionProblem& problem) {
  const int64_t blocks = (problem.seqlen_k + kBackwardKeys - 1) / kBackwardKeys;
  if (blocks <= 1 || has_diagonal(problem)) return 1;
  constexpr int64_t kSize = sizeof(float);
  const int64_t dim_qk = round_up(problem.head_dim_qk, 16), dim_v = round_up(problem.head_dim_v, 16), l2 = l2_bytes();
  if (problem.seqlen_q * (2 * dim_qk + dim_v) * kSize <= 2 * l2) return 1;
  const int64_t block_bytes = kBackwardKeys * (3 * dim_qk + 2 * dim_v) * kSize;
  return max_of(min_of(l2 / 4 / block_bytes, blocks), int64_t{1});
}

template <class T>
class BackwardPass {
 public:
  BackwardPass(const AttentionProblem& problem, char* scratch)
      : problem_(problem),
        arena_(scratch),
        tasks_(problem),
        group_(problem.num_heads / max_of(problem.num_heads_kv, int64_t{1})),
        dim_qk_(round_up(problem.head_dim_qk, 16)),
        dim_v_(round_up(problem.head_dim_v, 16)),
        row_blocks_((problem.seqlen_q + kBackwardRows - 1) / kBackwardRows),
        blocks_together_(key_blocks_together(problem)),
        held_keys_(group_ > 1 ? tasks_.most_keys() : blocks_together_ * kBackwardKeys),
        softmax_(problem, arena_),
        few_rows_(problem, 1, arena_) {
    query_rows_ = arena_.take<float>(problem.seqlen_q * dim_qk_);
    dout_rows_ = arena_.take<float>(problem.seqlen_q * dim_v_);
    dquery_sum_ = arena_.take<float>(problem.seqlen_q * dim_qk_);
    dquery_part_ = arena_.take<float>(problem.num_key_parts > 1 ? problem.seqlen_q * dim_qk_ : 0);
    key_t_ = arena_.take<float>(blocks_together_ * kBackwardKeys * dim_qk_);
    value_t_ = arena_.take<float>(blocks_together_ * kBackwardKeys * dim_v_);
    key_rows_ = arena_.take<float>(blocks_together_ * kBackwardKeys * dim_qk_);
    dkey_ = arena_.take<float>(held_keys_ * dim_qk_);
    dvalue_ = arena_.take<float>(held_keys_ * dim_v_);
    key_bias_ = arena_.take<float>(problem.key_mask ? round_up(problem.seqlen_k, kBackwardKeys) : 0);
    rows_summed_ = arena_.take<uint8_t>(row_blocks_);
    part_started_ = arena_.take<uint8_t>(row_blocks_);
    keys_started_ = arena_.take<uint8_t>(held_keys_ / kBackwardKeys);
    if (problem.row_tiles.data) tile_kinds_ = arena_.take<uint8_t>(row_blocks_ * problem.row_tiles.num_tiles);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task)
      tasks_.for_each_head(task, [&](int64_t b, int64_t h_kv, bool) { run_key_head(task, b, h_kv, task + 1 < last_task); });
  }

 private:
  static constexpr int64_t kScoreStride = SoftmaxGradient::kScoreStride, kSize = sizeof(T);

  void run_key_head(int64_t task, int64_t b, int64_t h_kv, bool more) {
    set_key_head(b, h_kv);
    if (bounds_.seqlen_q <= kFewRows) return few_rows_.run_key_heads(task, b, h_kv);
    for (int64_t n = 0; n < held_keys_ / kBackwardKeys; ++n) keys_started_[n] = 0;
    const Range parts = tasks_.parts(task, bounds_.seqlen_k), all_keys = tasks_.keys(parts, bounds_.seqlen_k);
    if (parts.first == parts.last) return;
    for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
      const bool last_head = h + 1 == (h_kv + 1) * group_;
      set_head(h);
      pack_query_side();
      plan_prefetch(more && last_head);
      for (int64_t part = parts.first; part < parts.last; ++part) {
        start_part(task, part, part == parts.first);
        const Range range = tasks_.keys({part, part + 1}, bounds_.seqlen_k);
        for (int64_t key0 = range.first; key0 < range.last; key0 += blocks_together_ * kBackwardKeys) {
          const int64_t keys = min_of(blocks_together_ * kBackwardKeys, range.last - key0);
          held_ = group_ > 1 ? key0 - all_keys.first : 0;
          for (int64_t n = 0; group_ == 1 && n < blocks_together_; ++n) keys_started_[n] = 0;
          attend(key0, keys);
          for (int64_t j = 0; last_head && j < keys; j += kBackwardKeys)
            store_key_gradients(key0 + j, min_of(kBackwardKeys, keys - j), held_ + j);
        }
        if (part > parts.first) add_part();
        store_head_gradients(problem_, bounds_, batch_, head_, part, softmax_.delta(), softmax_.dslope());
      }
      store_dquery(parts.first);
    }
    if (all_keys.last == bounds_.seqlen_k) {
      store_rows(key_row(problem_.dkey, 0), problem_.dkey.row, bounds_.seqlen_k, bounds_.keys, problem_.head_dim_qk, nullptr, 0, 0.0f);
      store_rows(key_row(problem_.dvalue, 0), problem_.dvalue.row, bounds_.seqlen_k, bounds_.keys, problem_.head_dim_v, nullptr, 0, 0.0f);
    }
  }

  T* query_row(const StridedTensor& tensor, int64_t row) const { return row_ptr<T>(tensor, batch_, head_, bounds_.first_query + row); }
  T* key_row(const StridedTensor& tensor, int64_t key) const { return row_ptr<T>(tensor, batch_, kv_head_, bounds_.first_key + key); }

  void set_key_head(int64_t b, int64_t h_kv) {
    kv_head_ = h_kv;
    if (b == batch_) return;
    batch_ = b;
    bounds_ = sequence_bounds(problem_, b);
    if (problem_.key_mask) has_holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, kBackwardKeys));
  }

  void set_head(int64_t h) {
    head_ = h;
    batch_head_ = batch_ * problem_.num_heads + h;
    for (int64_t block = 0; tile_kinds_ && block < row_blocks_; ++block)
      expand_tiles(problem_.row_tiles, batch_, h, block, tile_kinds_ + block * problem_.row_tiles.num_tiles);
  }

  // dQ from the first of a task's parts goes to the sum itself.
  void start_part(int64_t task, int64_t part, bool first) {
    float* dmask = tasks_.mask_gradient(task, part);
    if (dmask) dmask += batch_ * problem_.dattn_mask_batch + head_ * problem_.dattn_mask_head;
    softmax_.enter(bounds_, batch_, head_, has_holes_ ? key_bias_ : nullptr, dmask);
    dquery_ = first ? dquery_sum_ : dquery_part_;
    rows_started_ = first ? rows_summed_ : part_started_;
    for (int64_t block = 0; block < row_blocks_; ++block) rows_started_[block] = 0;
  }

  // Adds a part of dQ to the sum of those before it.
  void add_part() {
    for (int64_t block = 0; block < row_blocks_; ++block) {
      if (!part_started_[block]) continue;
      const int64_t begin = block * kBackwardRows * dim_qk_, end = min_of((block + 1) * kBackwardRows, bounds_.seqlen_q) * dim_qk_;
      for (int64_t i = begin; i < end; i += kLanes) {
        const Vec part = load(dquery_part_ + i);
        store(dquery_sum_ + i, rows_summed_[block] ? add(load(dquery_sum_ + i), part) : part);
      }
      rows_summed_[block] = 1;
    }
  }

  // Packs Q and dout, and computes delta.
  void pack_query_side() {
    const int64_t rows = bounds_.seqlen_q;
    pack_rows<T>(query_row(problem_.query, 0), problem_.query.row, rows, problem_.head_dim_qk, query_rows_, dim_qk_);
    pack_rows<T>(query_row(problem_.dout, 0), problem_.dout.row, rows, problem_.head_dim_v, dout_rows_, dim_v_);
    const float* lse = problem_.lse + lse_offset(problem_, bounds_, batch_, head_);
    for (int64_t i = 0; i < rows; ++i) {
      float* dout = dout_rows_ + i * dim_v_;
      if (lse[i] == -kInfinity) {  // the row sees nothing, so it gets no gradient; it may hold garbage
        softmax_.enter_row_that_sees_nothing(i);
        for (int64_t d = 0; d < dim_v_; d += kLanes) store(dout + d, broadcast(0.0f));
        for (int64_t d = 0; d < dim_qk_; d += kLanes) store(query_rows_ + i * dim_qk_ + d, broadcast(0.0f));
        continue;
      }
      softmax_.enter_row(i, lse[i], row_delta<T>(problem_, bounds_, batch_, head_, i, dout));
    }
  }

  // Packs a block of keys into the packed buffers, starting at key `place`.
  void pack_keys(int64_t key0, int64_t keys, int64_t place) {
    const float* absent = has_holes_ ? key_bias_ + key0 : nullptr;
    const T *key = key_row(problem_.key, key0), *value = key_row(problem_.value, key0);
    pack_rows(key, problem_.key.row, keys, problem_.head_dim_qk, key_rows_ + place * dim_qk_, dim_qk_, absent);
    pack_transposed(key, problem_.key.row, keys, problem_.head_dim_qk, key_t_ + place * dim_qk_, absent);
    pack_transposed(value, problem_.value.row, keys, problem_.head_dim_v, value_t_ + place * dim_v_, absent);
  }

  // Plans what to prefetch during this head's products: the lines of its gradients, then the next head's inputs.
  void plan_prefetch(bool more) {
    prefetcher_.clear();
    const auto writes = [&](const StridedTensor& tensor, const T* row, int64_t rows, int64_t head_dim) {
      prefetcher_.add_writes(row, tensor.row * kSize, rows, head_dim * kSize);
    };
    writes(problem_.dkey, key_row(problem_.dkey, 0), bounds_.keys, problem_.head_dim_qk);
    writes(problem_.dvalue, key_row(problem_.dvalue, 0), bounds_.keys, problem_.head_dim_v);
    writes(problem_.dquery, query_row(problem_.dquery, 0), bounds_.rows, problem_.head_dim_qk);
    if (more) prefetch_inputs<T>(problem_, batch_head_ + 1, prefetcher_);
    const int64_t row_blocks = (bounds_.seqlen_q + kBackwardRows - 1) / kBackwardRows,
                  key_blocks = (bounds_.seqlen_k + kBackwardKeys - 1) / kBackwardKeys;
    const int64_t blocks = is_causal(problem_) ? (row_blocks * key_blocks + 1) / 2 : row_blocks * key_blocks;
    prefetcher_.spread_over(blocks * (matmul_ticks(kBackwardRows, kBackwardKeys, problem_.head_dim_qk + problem_.head_dim_v) +
                                      matmul_ticks(kBackwardKeys, dim_qk_ + dim_v_, kBackwardRows) +
                                      matmul_ticks(kBackwardRows, dim_qk_, kBackwardKeys)));
  }

  // Processes all rows that see some of these keys, at most blocks_together_ blocks.
  void attend(int64_t key0, int64_t keys) {
    const int64_t first_row = first_row_seeing(bounds_, key0) / kBackwardRows * kBackwardRows,
                  rows_end = rows_seeing(bounds_, key0 + keys - 1);
    uint32_t loaded = 0;  // one bit per block of keys
    for (int64_t row0 = first_row; row0 < rows_end; row0 += kBackwardRows)
      for (int64_t place = 0; place < keys; place += kBackwardKeys) {
        const uint8_t kind = tile_kinds_ ? tile_kinds_[row0 / kBackwardRows * problem_.row_tiles.num_tiles + (key0 + place) / 64]
                                         : static_cast<uint8_t>(kFullTile);
        if (kind == kEmptyTile) continue;
        const int64_t block_keys = min_of(kBackwardKeys, keys - place);
        const uint32_t bit = uint32_t{1} << (place / kBackwardKeys);
        if (!(loaded & bit)) pack_keys(key0 + place, block_keys, place), loaded |= bit;
        accumulate(row0, min_of(kBackwardRows, bounds_.seqlen_q - row0), key0 + place, block_keys, place, kind == kMixedTile);
      }
  }

  // Computes one block of P and dS, and adds its contributions to dV, dK and dQ.
  void accumulate(int64_t row0, int64_t rows, int64_t key0, int64_t keys, int64_t place, bool mixed) {
    const float *q = query_rows_ + row0 * dim_qk_, *dout = dout_rows_ + row0 * dim_v_, *packed_keys = key_rows_ + place * dim_qk_,
                *keys_t = key_t_ + place * dim_qk_, *values_t = value_t_ + place * dim_v_;
    float *weights = softmax_.weights(), *dscores = softmax_.dscores();
    const int64_t columns = round_up(keys, kLanes), held = held_ + place;
    matmul(rows, columns, problem_.head_dim_qk, q, dim_qk_, 1, keys_t, kBackwardKeys, weights, kScoreStride, false, &prefetcher_);
    matmul(rows, columns, problem_.head_dim_v, dout, dim_v_, 1, values_t, kBackwardKeys, dscores, kScoreStride, false, &prefetcher_);
    softmax_.apply(row0, rows, key0, keys, mixed);
    uint8_t &keys_started = keys_started_[held / kBackwardKeys], &rows_started = rows_started_[row0 / kBackwardRows];
    matmul(keys, dim_v_, rows, weights, 1, kScoreStride, dout, dim_v_, dvalue_ + held * dim_v_, dim_v_, keys_started != 0, &prefetcher_);
    matmul(keys, dim_qk_, rows, dscores, 1, kScoreStride, q, dim_qk_, dkey_ + held * dim_qk_, dim_qk_, keys_started != 0, &prefetcher_);
    matmul(rows, dim_qk_, keys, dscores, kScoreStride, 1, packed_keys, dim_qk_, dquery_ + row0 * dim_qk_, dim_qk_, rows_started != 0,
           &prefetcher_);
    keys_started = rows_started = 1;
  }

  void store_key_gradients(int64_t key0, int64_t keys, int64_t held) {
    const float* absent = has_holes_ ? key_bias_ + key0 : nullptr;
    const bool seen = keys_started_[held / kBackwardKeys] != 0;
    store_rows(key_row(problem_.dkey, 0), problem_.dkey.row, key0, key0 + keys, problem_.head_dim_qk,
               seen ? dkey_ + held * dim_qk_ : nullptr, dim_qk_, problem_.softmax_scale, absent);
    store_rows(key_row(problem_.dvalue, 0), problem_.dvalue.row, key0, key0 + keys, problem_.head_dim_v,
               seen ? dvalue_ + held * dim_v_ : nullptr, dim_v_, problem_.dropout_scale(), absent);
  }

  // Stores dQ of the head, or only the part that this task computes.
  void store_dquery(int64_t part) {
    const bool shared = problem_.dquery_parts != nullptr;
    for (int64_t row0 = 0; row0 < bounds_.seqlen_q; row0 += kBackwardRows) {
      const int64_t end = min_of(row0 + kBackwardRows, bounds_.seqlen_q);
      const float* source = rows_summed_[row0 / kBackwardRows] ? dquery_sum_ + row0 * dim_qk_ : nullptr;
      if (shared)
        store_rows(tasks_.dquery_part(part, bounds_, batch_, head_), problem_.head_dim_qk, row0, end, problem_.head_dim_qk, source, dim_qk_,
                   1.0f);
      else
        store_rows(query_row(problem_.dquery, 0), problem_.dquery.row, row0, end, problem_.head_dim_qk, source, dim_qk_,
                   problem_.softmax_scale);
    }
    if (!shared)
      store_rows(query_row(problem_.dquery, 0), problem_.dquery.row, bounds_.seqlen_q, bounds_.rows, problem_.head_dim_qk, nullptr, 0,
                 0.0f);
  }

  // Stores factor * source into rows [begin, end) of `gradient`, or 0 if source is null or the key is absent.
  template <class U>
  static void store_rows(U* gradient, int64_t stride, int64_t begin, int64_t end, int64_t head_dim, const float* source, int64_t source_row,
                         float factor, const float* absent = nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      const bool zero = !source || is_absent(absent, row - begin);
      store_row(gradient + row * stride, zero ? nullptr : source + (row - begin) * source_row, factor, head_dim);
    }
  }

  const AttentionProblem& problem_;
  Arena arena_;
  const BackwardTasks tasks_;
  const int64_t group_;  // query heads per key head
  const int64_t dim_qk_, dim_v_;
  const int64_t row_blocks_;
  const int64_t blocks_together_;  // see key_blocks_together
  const int64_t held_keys_;  // keys whose dK and dV are held at once: those blocks, or all of the task's if query heads share a key head
  SoftmaxGradient softmax_;
  FewRowsBackward<T> few_rows_;

  float* query_rows_;                     // (seqlen_q, dim_qk)
  float *dquery_sum_, *dquery_part_;      // (seqlen_q, dim_qk), over the parts of the keys so far, and from one part
  float* dquery_ = nullptr;               // one of the two: what the current part's dQ goes to
  float* dout_rows_;                      // (seqlen_q, dim_v)
  float *key_t_, *value_t_;               // (blocks_together, head_dim, kBackwardKeys), transposed
  float* key_rows_;                       // (blocks_together, kBackwardKeys, dim_qk)
  float* dkey_;                           // (held_keys, dim_qk)
  float* dvalue_;                         // (held_keys, dim_v)
  float* key_bias_;                       // (seqlen_k,) 0 or -inf
  uint8_t *rows_summed_, *part_started_;  // per block of rows: whether dquery_sum_, or dquery_part_, holds something
  uint8_t* rows_started_ = nullptr;       // one of the two
  uint8_t* keys_started_;                 // per block of keys: whether dkey_ and dvalue_ hold something
  uint8_t* tile_kinds_ = nullptr;         // (row_blocks, tiles) of the head

  int64_t batch_ = -1, head_ = 0, kv_head_ = 0, batch_head_ = 0, held_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

template <class T>
static Plan plan_backward(const AttentionProblem& problem, int num_threads) {
  if (problem.seqlen_q <= kFewRows) return FewRowsBackward<T>::plan(problem, num_threads);
  return {BackwardTasks(problem).count(), problem.seqlen_q, BackwardPass<T>(problem, nullptr).scratch_bytes()};
}

template <class T>
static void run_backward(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
  if (problem.seqlen_q <= kFewRows) return FewRowsBackward<T>::run(problem, plan, first_task, last_task, scratch);
  BackwardPass<T>(problem, scratch).run(first_task, last_task);
}

}  // namespace fused_attention::cpu::FA_ISA
