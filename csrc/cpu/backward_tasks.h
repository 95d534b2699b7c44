// SPDX-License-Identifier: Apache-2.0
// How a backward pass is split into tasks. A task is the query heads of one key head, with one part of its keys if there are fewer heads
// than threads. If attn_mask needs a gradient, the heads that share a slice of the mask go to one task, one after the other, so that the
// task owns the slice's gradient, or its own part of it. Every task sums in a fixed order: over keys part by part, see key_parts.
#pragma once
#include "kernel_table.h"
#include "mask.h"
#include "matmul.h"

namespace fused_attention::cpu::FA_ISA {

struct Range {
  int64_t first, last;
};

class BackwardTasks {
 public:
  // heads_per_task: key heads that a task takes together, if the mask's gradient does not tie all of them.
  explicit BackwardTasks(const AttentionProblem& problem, int64_t heads_per_task = 1)
      : problem_(problem),
        batches_apart_(!problem.dattn_mask || problem.dattn_mask_batch != 0),
        heads_apart_(!problem.dattn_mask || problem.dattn_mask_head != 0),
        batches_(batches_apart_ ? problem.batch : min_of(problem.batch, int64_t{1})),
        heads_together_(heads_apart_ ? heads_per_task : 1),
        heads_(heads_apart_ ? (problem.num_heads_kv + heads_per_task - 1) / heads_per_task : min_of(problem.num_heads_kv, int64_t{1})),
        tasks_per_head_(problem.dquery_parts ? problem.num_key_parts : 1) {}

  int64_t count() const { return batches_ * heads_ * problem_.num_mask_parts * tasks_per_head_; }

  // Where a task adds to the mask's gradient. Parts of the keys write different elements, unless the mask has a single element for all
  // keys.
  float* mask_gradient(int64_t task, int64_t key_part) const {
    if (!problem_.dattn_mask) return nullptr;
    const int64_t part = task / tasks_per_head_ % problem_.num_mask_parts;
    const int64_t place = problem_.dattn_mask_key != 0 ? part : part * problem_.num_key_parts + key_part;
    return problem_.dattn_mask + place * problem_.dattn_mask_part;
  }

  // How many key heads go together from one that for_each_head visits on.
  int64_t heads_from(int64_t h_kv) const { return min_of(heads_together_, problem_.num_heads_kv - h_kv); }

  // Calls visit(b, h_kv, more) for each key head of a task, or for the first of those that go together; more: whether another one follows.
  template <class Visit>
  void for_each_head(int64_t task, Visit&& visit) const {
    const int64_t unit = task / tasks_per_head_, parts = problem_.num_mask_parts, part = unit % parts;
    const int64_t group_b = unit / parts / heads_, group_h = unit / parts % heads_ * heads_together_;
    const int64_t heads = heads_apart_ ? 1 : problem_.num_heads_kv, members = heads * (batches_apart_ ? 1 : problem_.batch);
    for (int64_t n = members * part / parts, end = members * (part + 1) / parts; n < end; ++n)
      visit(group_b + n / heads, group_h + n % heads, n + 1 < end);
  }

  // The parts of a sequence's keys that a task computes; none if the sequence has fewer than the longest one.
  Range parts(int64_t task, int64_t seqlen_k) const {
    const int64_t parts = key_parts(seqlen_k), part = task % tasks_per_head_;
    return tasks_per_head_ == 1 ? Range{0, parts} : Range{min_of(part, parts), min_of(part + 1, parts)};
  }

  // The keys of parts [first, last), in whole tiles of 64, up to seqlen_k.
  static Range keys(Range parts, int64_t seqlen_k) {
    const int64_t tiles = (seqlen_k + 63) / 64, all = key_parts(seqlen_k);
    return {tiles * parts.first / all * 64, min_of(tiles * parts.last / all * 64, seqlen_k)};
  }

  // The most keys that a task computes, in whole tiles. Parts of a short sequence may be longer than those of the longest.
  int64_t most_keys() const {
    const int64_t all = (problem_.seqlen_k + 63) / 64;
    if (tasks_per_head_ == 1) return all * 64;
    int64_t most = 0;
    for (int64_t tiles = 1; tiles <= all; ++tiles) {
      const int64_t parts = key_parts(tiles * 64);
      most = max_of(most, (tiles + parts - 1) / parts);
    }
    return most * 64;
  }

  // Row 0 of the sequence in a part of dquery.
  float* dquery_part(int64_t part, const SequenceBounds& bounds, int64_t b, int64_t h) const {
    const int64_t rows = problem_.num_heads * (problem_.cu_seqlens_q ? problem_.num_tokens_q : problem_.batch * problem_.seqlen_q);
    return problem_.dquery_parts + (part * rows + lse_offset(problem_, bounds, b, h)) * problem_.head_dim_qk;
  }

 private:
  const AttentionProblem& problem_;
  const bool batches_apart_, heads_apart_;
  const int64_t batches_, heads_together_, heads_;
  const int64_t tasks_per_head_;  // 1, or one for each part of the keys
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
  if (problem.out_error.data) reads(problem.out_error, h, query0, problem.seqlen_q, problem.head_dim_v);
  reads(problem.key, h_kv, key0, problem.seqlen_k, problem.head_dim_qk);
  reads(problem.value, h_kv, key0, problem.seqlen_k, problem.head_dim_v);
}

// Stores what a part of the keys adds to the gradients of the head's slope and, once, of its sink, which depends on the rows alone:
// d lse / d sink is the sink's own weight, and the sink has no value.
static inline void store_head_gradients(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t b, int64_t h, int64_t part,
                                        const float* delta, float dslope) {
  const int64_t head = b * problem.num_heads + h;
  if (problem.dalibi_slopes) problem.dalibi_slopes[head * problem.num_key_parts + part] = dslope;
  if (!problem.dsinks || part != 0) return;
  const float* lse = problem.lse + lse_offset(problem, bounds, b, h);
  float sum = 0.0f;
  for (int64_t i = 0; i < bounds.seqlen_q; ++i)
    if (lse[i] != -kInfinity) sum -= __builtin_exp2f((problem.sinks[h] - lse[i]) * kLog2e) * delta[i];
  problem.dsinks[head] = sum;
}

}  // namespace fused_attention::cpu::FA_ISA
