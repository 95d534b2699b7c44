// SPDX-License-Identifier: Apache-2.0
// Which rows and keys of a sequence exist, and which keys a row sees by position (causal, window).
#pragma once
#include "../problem.h"
#include "simd.h"

namespace fused_attention::cpu::FA_ISA {

// Query rows of a sequence for which packing its keys would cost more than it saves.
constexpr int64_t kFewRows = 2;

// One sequence of a batch: its rows [0, seqlen_q) and keys [0, seqlen_k) are present. Row i sees keys j with
// -left <= j - i - diagonal <= right.
struct SequenceBounds {
  int64_t seqlen_q, seqlen_k, diagonal;
  int64_t left, right;
  int64_t rows, keys;              // of the results; absent ones get zeros
  int64_t first_query, first_key;  // where the sequence starts among packed tokens
};

struct TokenRange {
  int64_t first, length;
};

// The tokens of packed sequence b, always within [0, num_tokens], even if cu_seqlens is out of range.
static inline TokenRange packed_sequence(const int32_t* cu_seqlens, int64_t b, int64_t num_tokens, int64_t longest) {
  const int64_t first = min_of(max_of(int64_t{cu_seqlens[b]}, int64_t{0}), num_tokens);
  const int64_t last = min_of(max_of(int64_t{cu_seqlens[b + 1]}, first), num_tokens);
  return {first, min_of(last - first, longest)};
}

static inline SequenceBounds sequence_bounds(const AttentionProblem& problem, int64_t b) {
  constexpr int64_t kAll = INT64_MAX / 4;
  SequenceBounds bounds{};
  bounds.rows = problem.seqlen_q, bounds.keys = problem.seqlen_k;
  if (problem.cu_seqlens_q) {
    const TokenRange queries = packed_sequence(problem.cu_seqlens_q, b, problem.num_tokens_q, problem.seqlen_q);
    const TokenRange keys = packed_sequence(problem.cu_seqlens_k, b, problem.num_tokens_k, problem.seqlen_k);
    bounds.first_query = queries.first, bounds.rows = queries.length;
    bounds.first_key = keys.first, bounds.keys = keys.length;
  }
  const auto present = [b](const int32_t* lengths, int64_t all) {
    return lengths ? min_of(max_of(int64_t{lengths[b]}, int64_t{0}), all) : all;
  };
  bounds.seqlen_q = present(problem.query_lengths, bounds.rows);
  bounds.seqlen_k = present(problem.key_lengths, bounds.keys);
  bounds.diagonal = problem.diagonal + (problem.bottom_right ? bounds.seqlen_k - bounds.seqlen_q : 0);
  bounds.left = problem.window_left < kUnlimited ? problem.window_left : kAll;
  bounds.right = problem.window_right < kUnlimited ? problem.window_right : kAll;
  if (problem.key_mask) {  // skip trailing masked keys, without moving the diagonal
    const uint8_t* allowed = problem.key_mask + b * problem.key_mask_batch;
    while (bounds.seqlen_k > 0 && !allowed[(bounds.seqlen_k - 1) * problem.key_mask_key]) --bounds.seqlen_k;
  }
  return bounds;
}

// Whether a row's position limits the keys it sees.
static inline bool has_diagonal(const AttentionProblem& problem) {
  return problem.window_left < kUnlimited || problem.window_right < kUnlimited;
}

// Whether rows see no key past the diagonal, so only about half of the scores are needed.
static inline bool is_causal(const AttentionProblem& problem) { return problem.window_right == 0; }

// `row` sees keys [first_visible_key, visible_keys), both in [0, seqlen_k]; the range may be empty.
static inline int64_t visible_keys(const SequenceBounds& bounds, int64_t row) {
  return min_of(max_of(row + bounds.diagonal + bounds.right + 1, int64_t{0}), bounds.seqlen_k);
}
static inline int64_t first_visible_key(const SequenceBounds& bounds, int64_t row) {
  return min_of(max_of(row + bounds.diagonal - bounds.left, int64_t{0}), bounds.seqlen_k);
}

// Rows [first_row_seeing, rows_seeing) see `key`; the first is >= 0, the second <= seqlen_q, and the range may be empty.
static inline int64_t first_row_seeing(const SequenceBounds& bounds, int64_t key) {
  return max_of(key - bounds.diagonal - bounds.right, int64_t{0});
}
static inline int64_t rows_seeing(const SequenceBounds& bounds, int64_t key) {
  return min_of(key - bounds.diagonal + bounds.left + 1, bounds.seqlen_q);
}

// First row of sequence b in lse and its gradient.
static inline int64_t lse_offset(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t b, int64_t h) {
  return problem.cu_seqlens_q ? h * problem.num_tokens_q + bounds.first_query : (b * problem.num_heads + h) * problem.seqlen_q;
}

// The first row of sequence b, for prefetches that look past the current sequence.
static inline int64_t first_query_of(const AttentionProblem& problem, int64_t b) {
  return problem.cu_seqlens_q ? packed_sequence(problem.cu_seqlens_q, b, problem.num_tokens_q, problem.seqlen_q).first : 0;
}
static inline int64_t first_key_of(const AttentionProblem& problem, int64_t b) {
  return problem.cu_seqlens_k ? packed_sequence(problem.cu_seqlens_k, b, problem.num_tokens_k, problem.seqlen_k).first : 0;
}

// The key head that query head h reads.
static inline int64_t key_head(const AttentionProblem& problem, int64_t h) { return h / (problem.num_heads / problem.num_heads_kv); }

// key_bias: (padded,), 0 for a key that may be attended to, -inf for a masked key and from seqlen_k on.
// Returns true if there are masked keys below seqlen_k ("holes").
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

}  // namespace fused_attention::cpu::FA_ISA
