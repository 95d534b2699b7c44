// SPDX-License-Identifier: Apache-2.0
// Which keys a query row sees. Included after simd.h; brings dropout.h with it.
#pragma once

namespace fused_attention::cpu::FA_ISA {

// The part of one sequence that is present: rows [0, seqlen_q), keys [0, seqlen_k). Under a causal mask row i sees keys j <= i + diagonal.
struct SequenceBounds {
  int64_t seqlen_q, seqlen_k, diagonal;
};

static inline SequenceBounds sequence_bounds(const AttentionProblem& problem, int64_t b) {
  const int64_t seqlen_q =
      problem.query_lengths ? min_of(max_of(int64_t{problem.query_lengths[b]}, int64_t{0}), problem.seqlen_q) : problem.seqlen_q;
  int64_t seqlen_k = problem.key_lengths ? min_of(max_of(int64_t{problem.key_lengths[b]}, int64_t{0}), problem.seqlen_k) : problem.seqlen_k;
  const int64_t diagonal = problem.causal == Causal::bottom_right ? seqlen_k - seqlen_q : 0;
  if (problem.key_mask) {  // trailing masked keys cost nothing; they do not move the diagonal
    const uint8_t* allowed = problem.key_mask + b * problem.key_mask_batch;
    while (seqlen_k > 0 && !allowed[(seqlen_k - 1) * problem.key_mask_key]) --seqlen_k;
  }
  return {seqlen_q, seqlen_k, diagonal};
}

// Number of leading keys that `row` may see, in [0, seqlen_k].
static inline int64_t visible_keys(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t row) {
  if (problem.causal == Causal::none) return bounds.seqlen_k;
  return min_of(max_of(row + bounds.diagonal + 1, int64_t{0}), bounds.seqlen_k);
}

// The first row that sees `key`, in [0, infinity): rows before it skip the key.
static inline int64_t first_row_seeing(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t key) {
  return problem.causal == Causal::none ? 0 : max_of(key - bounds.diagonal, int64_t{0});
}

// key_bias: (padded,), 0 for a key that may be attended to, -inf for one that may not and from seqlen_k on.
// Returns true when there are masked keys below seqlen_k ("holes").
static inline bool fill_key_bias(const AttentionProblem& problem, int64_t b, int64_t seqlen_k, float* key_bias, int64_t padded) {
  const uint8_t* allowed = problem.key_mask ? problem.key_mask + b * problem.key_mask_batch : nullptr;
  bool holes = false;
  for (int64_t j = 0; j < seqlen_k; ++j) {
    const bool masked = allowed && !allowed[j * problem.key_mask_key];
    key_bias[j] = masked ? -kInfinity : 0.0f;
    holes |= masked;
  }
  for (int64_t j = seqlen_k; j < padded; ++j) key_bias[j] = -kInfinity;
  return holes;
}

constexpr float kMaskedBelow = -1e30f;  // attn_mask values below it mask the entry, as -inf does

// kLanes scores in units of log2: scale * score + log2(e) * mask + key_bias, with -inf at masked entries. `mask` and `key_bias`
// may be null; only the first `remaining` values of `mask` are read.
FA_INLINE Vec biased_scores(Vec score, float scale, const float* mask, const float* key_bias, int64_t remaining) {
  Vec x = mul(score, broadcast(scale));
  if (mask) {
    const Vec bias = remaining >= kLanes ? load(mask) : load_first(mask, remaining);
    x = fmadd(bias, broadcast(kLog2e), x);
    x = select(less_than(bias, broadcast(kMaskedBelow)), broadcast(-kInfinity), x);
  }
  return key_bias ? add(x, load(key_bias)) : x;
}

}  // namespace fused_attention::cpu::FA_ISA

#include "dropout.h"
