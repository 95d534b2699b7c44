// SPDX-License-Identifier: Apache-2.0
// How a backward pass is split into tasks. A task is the query heads of one key head, with a range of its keys if there are fewer heads
// than threads. If attn_mask needs a gradient, the heads that share a slice of the mask go to one task, one after the other, so that the
// task owns the slice's gradient, or its own part of it. Every task sums in a fixed order.
#pragma once
#include "mask.h"
#include "matmul.h"

namespace fused_attention::cpu::FA_ISA {

struct KeyRange {
  int64_t first, last;
};

class BackwardTasks {
 public:
  explicit BackwardTasks(const AttentionProblem& problem)
      : problem_(problem),
        batches_apart_(!problem.dattn_mask || problem.dattn_mask_batch != 0),
        heads_apart_(!problem.dattn_mask || problem.dattn_mask_head != 0),
        batches_(batches_apart_ ? problem.batch : min_of(problem.batch, int64_t{1})),
        heads_(heads_apart_ ? problem.num_heads_kv : min_of(problem.num_heads_kv, int64_t{1})) {}

  int64_t count() const { return batches_ * heads_ * problem_.num_mask_parts * problem_.num_key_splits; }

  int64_t split(int64_t task) const { return task % problem_.num_key_splits; }

  // The part of the mask's gradient that a task adds to. Key splits write different elements of one part, unless the mask has a single
  // element for all keys.
  float* mask_gradient(int64_t task) const {
    if (!problem_.dattn_mask) return nullptr;
    const int64_t part = task / problem_.num_key_splits % problem_.num_mask_parts;
    const int64_t place = problem_.dattn_mask_key != 0 ? part : part * problem_.num_key_splits + split(task);
    return problem_.dattn_mask + place * problem_.dattn_mask_part;
  }

  // Calls visit(b, h_kv, more) for each key head of a task; more: whether another one follows.
  template <class Visit>
  void for_each_head(int64_t task, Visit&& visit) const {
    const int64_t unit = task / problem_.num_key_splits, parts = problem_.num_mask_parts, part = unit % parts;
    const int64_t group_b = unit / parts / heads_, group_h = unit / parts % heads_;
    const int64_t heads = heads_apart_ ? 1 : problem_.num_heads_kv, members = heads * (batches_apart_ ? 1 : problem_.batch);
    for (int64_t n = members * part / parts, end = members * (part + 1) / parts; n < end; ++n)
      visit(group_b + n / heads, group_h + n % heads, n + 1 < end);
  }

  // The keys of a task, in whole tiles of 64, up to seqlen_k.
  KeyRange keys(int64_t task, int64_t seqlen_k) const {
    const int64_t tiles = (seqlen_k + 63) / 64, splits = problem_.num_key_splits;
    return {tiles * split(task) / splits * 64, min_of(tiles * (split(task) + 1) / splits * 64, seqlen_k)};
  }
  int64_t most_keys() const { return ((problem_.seqlen_k + 63) / 64 + problem_.num_key_splits - 1) / problem_.num_key_splits * 64; }

  // Row 0 of the sequence in a split's part of dquery.
  float* dquery_part(int64_t task, const SequenceBounds& bounds, int64_t b, int64_t h) const {
    const int64_t rows = problem_.num_heads * (problem_.cu_seqlens_q ? problem_.num_tokens_q : problem_.batch * problem_.seqlen_q);
    return problem_.dquery_parts + (split(task) * rows + lse_offset(problem_, bounds, b, h)) * problem_.head_dim_qk;
  }

 private:
  const AttentionProblem& problem_;
  const bool batches_apart_, heads_apart_;
  const int64_t batches_, heads_;
};

// Prefetches what the backward of a head reads, if there is such a head; batch_head counts the heads of the whole batch.
template <class T>
void prefetch_inputs(const AttentionProblem& problem, int64_t batch_head, RowPrefetcher& prefetcher) {
  if (batch_head >= problem.batch * problem.num_heads) return;
  const int64_t b = batch_head / problem.num_heads, h = batch_head % problem.num_heads, h_kv = key_head(problem, h);
  const int64_t query0 = first_query_of(problem, b), key0 = first_key_of(problem, b), size = static_cast<int64_t>(sizeof(T));
  const auto reads = [&](const StridedTensor& tensor, int64_t head, int64_t row, int64_t rows, int64_t head_dim) {
    prefetcher.add_reads(row_ptr<const T>(tensor, b, head, row), tensor.row * size, rows, head_dim * size);
  };
  reads(problem.query, h, query0, problem.seqlen_q, problem.head_dim_qk);
  reads(problem.dout, h, query0, problem.seqlen_q, problem.head_dim_v);
  reads(problem.out, h, query0, problem.seqlen_q, problem.head_dim_v);
  reads(problem.key, h_kv, key0, problem.seqlen_k, problem.head_dim_qk);
  reads(problem.value, h_kv, key0, problem.seqlen_k, problem.head_dim_v);
}

// Stores a head's contribution to the gradients of its slope and its sink. A range of keys gives part of the slope's gradient; the sink's
// depends on the rows alone: d lse / d sink is the sink's own weight, and the sink has no value.
static inline void store_head_gradients(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t b, int64_t h, int64_t split,
                                        const float* delta, float dslope) {
  const int64_t head = (b * problem.num_heads + h) * problem.num_key_splits;
  if (problem.dalibi_slopes) problem.dalibi_slopes[head + split] = dslope;
  if (!problem.dsinks || split != 0) return;
  const float* lse = problem.lse + lse_offset(problem, bounds, b, h);
  float sum = 0.0f;
  for (int64_t i = 0; i < bounds.seqlen_q; ++i)
    if (lse[i] != -kInfinity) sum -= __builtin_exp2f((problem.sinks[h] - lse[i]) * kLog2e) * delta[i];
  problem.dsinks[head] = sum;
}

}  // namespace fused_attention::cpu::FA_ISA
