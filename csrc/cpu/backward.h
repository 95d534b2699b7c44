// SPDX-License-Identifier: Apache-2.0
// Backward pass with float32 arithmetic; inputs and gradients are stored as float32, bfloat16 or float16. A task is one head:
//
//   delta = rowsum(dout * out) - dlse                                             (rows,)
//   for each block of keys, for each block of query rows that sees it:
//     S  = Q K^T,  P = exp2(c S - lse log2 e),  c = scale log2 e                  (rows, keys), recomputed from lse
//     dP = dout V^T, dropped entries 0, kept ones times dropout_scale
//     dS = P * (dP - delta)
//     dV += dropout(P)^T dout,   dK += dS^T Q,   dQ += dS K                       dQ is kept for the whole head
//
// Q, dout and dQ of the head live in float32 scratch (3 copies of seqlen_q x head_dim), everything else in blocks of 64 x 64.
// As in FlashAttention (Dao et al., 2022), with the lse gradient folded into delta: d lse / d S = P.
#pragma once

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBackwardRows = 64, kBackwardKeys = kKeyTile;

template <class T>
class BackwardPass {
 public:
  BackwardPass(const AttentionProblem& problem, char* scratch)
      : problem_(problem),
        query_columns_(round_up(problem.head_dim_qk, 16)),
        value_columns_(round_up(problem.head_dim_v, 16)),
        log2_scale_(problem.softmax_scale * kLog2e) {
    Arena arena(scratch);
    queries_ = arena.take<float>(problem.seqlen_q * query_columns_);
    douts_ = arena.take<float>(problem.seqlen_q * value_columns_);
    dqueries_ = arena.take<float>(problem.seqlen_q * query_columns_);
    row_shift_ = arena.take<float>(problem.seqlen_q);
    row_factor_ = arena.take<float>(problem.seqlen_q);
    delta_ = arena.take<float>(problem.seqlen_q);
    keys_t_ = arena.take<float>(problem.head_dim_qk * kBackwardKeys);
    values_t_ = arena.take<float>(problem.head_dim_v * kBackwardKeys);
    keys_ = arena.take<float>(kBackwardKeys * query_columns_);
    dkeys_ = arena.take<float>(kBackwardKeys * query_columns_);
    dvalues_ = arena.take<float>(kBackwardKeys * value_columns_);
    weights_ = arena.take<float>(kBackwardRows * kScoresRow);
    dscores_ = arena.take<float>(kBackwardRows * kScoresRow);
    key_bias_ = arena.take<float>(problem.key_mask ? round_up(problem.seqlen_k, kBackwardKeys) : 0);
    keep_ = arena.take<uint16_t>(kBackwardRows * kKeepWords);
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task) {
      enter(task);
      load_rows();
      plan_prefetch(task + 1 < last_task);
      for (int64_t key0 = 0; key0 < bounds_.seqlen_k; key0 += kBackwardKeys) {
        const int64_t keys = min_of(kBackwardKeys, bounds_.seqlen_k - key0);
        load_keys(key0, keys);
        const int64_t first_row = first_block_seeing(key0);
        for (int64_t row0 = first_row; row0 < bounds_.seqlen_q; row0 += kBackwardRows)
          accumulate(row0, min_of(kBackwardRows, bounds_.seqlen_q - row0), key0, keys, row0 > first_row);
        write_keys(key0, keys, first_row < bounds_.seqlen_q);
      }
      write_rows(problem_.dkey, bounds_.seqlen_k, problem_.seqlen_k, problem_.head_dim_qk, nullptr, 0, 0.0f);
      write_rows(problem_.dvalue, bounds_.seqlen_k, problem_.seqlen_k, problem_.head_dim_v, nullptr, 0, 0.0f);
      const int64_t first_row = bounds_.seqlen_k > 0 ? min_of(first_block_seeing(0), bounds_.seqlen_q) : bounds_.seqlen_q;
      write_rows(problem_.dquery, 0, first_row, problem_.head_dim_qk, nullptr, 0, 0.0f);
      write_rows(problem_.dquery, first_row, bounds_.seqlen_q, problem_.head_dim_qk, dqueries_ + first_row * query_columns_, query_columns_,
                 problem_.softmax_scale);
      write_rows(problem_.dquery, bounds_.seqlen_q, problem_.seqlen_q, problem_.head_dim_qk, nullptr, 0, 0.0f);
    }
  }

 private:
  static constexpr int64_t kScoresRow = kBackwardKeys + 16, kKeepWords = kBackwardKeys / 16, kSize = sizeof(T);

  // First row of the first block of query rows that sees `key`.
  int64_t first_block_seeing(int64_t key) const { return first_row_seeing(problem_, bounds_, key) / kBackwardRows * kBackwardRows; }

  void enter(int64_t task) {
    batch_head_ = task;
    h_ = task % problem_.num_heads;
    if (const int64_t b = task / problem_.num_heads; b != b_) {
      b_ = b;
      bounds_ = sequence_bounds(problem_, b);
      if (problem_.key_mask) holes_ = fill_key_bias(problem_, b, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, kBackwardKeys));
    }
  }

  // Packs Q and dout, computes delta, and how each row recomputes P: exp2(score - row_shift) * row_factor.
  void load_rows() {
    const int64_t rows = bounds_.seqlen_q;
    pack_rows(row_ptr<const T>(problem_.query, b_, h_, 0), problem_.query.row, rows, problem_.head_dim_qk, queries_, query_columns_);
    pack_rows(row_ptr<const T>(problem_.dout, b_, h_, 0), problem_.dout.row, rows, problem_.head_dim_v, douts_, value_columns_);
    const float* lse = problem_.lse + batch_head_ * problem_.seqlen_q;
    const float* dlse = problem_.dlse ? problem_.dlse + batch_head_ * problem_.seqlen_q : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      float* dout = douts_ + i * value_columns_;
      if (lse[i] == -kInfinity) {  // the row sees nothing: no gradient, whatever is stored in it
        row_shift_[i] = kInfinity;
        for (int64_t d = 0; d < value_columns_; d += kLanes) store(dout + d, broadcast(0.0f));
        for (int64_t d = 0; d < query_columns_; d += kLanes) store(queries_ + i * query_columns_ + d, broadcast(0.0f));
        continue;
      }
      const T* out = row_ptr<const T>(problem_.out, b_, h_, i);
      Vec sum = broadcast(0.0f);
      for (int64_t d = 0; d < problem_.head_dim_v; d += kLanes) {
        const int64_t remaining = problem_.head_dim_v - d;
        sum = fmadd(remaining >= kLanes ? load(out + d) : load_first(out + d, remaining), load(dout + d), sum);
      }
      delta_[i] = reduce_add(sum) - (dlse ? dlse[i] : 0.0f);
      // lse log2 e does not fit a float32; what rounding takes from it is put back as a factor.
      const float shift = lse[i] * kLog2e, lost = __builtin_fmaf(lse[i], kLog2e, -shift) + lse[i] * kLog2eRest;
      row_shift_[i] = shift;
      row_factor_[i] = 1.0f - lost * kLn2;
    }
  }

  void load_keys(int64_t key0, int64_t keys) {
    const float* absent = holes_ ? key_bias_ + key0 : nullptr;
    const T* key = row_ptr<const T>(problem_.key, b_, h_, key0);
    pack_rows(key, problem_.key.row, keys, problem_.head_dim_qk, keys_, query_columns_, absent);
    pack_transposed(key, problem_.key.row, keys, problem_.head_dim_qk, keys_t_, absent);
    pack_transposed(row_ptr<const T>(problem_.value, b_, h_, key0), problem_.value.row, keys, problem_.head_dim_v, values_t_, absent);
  }

  // What the products of this head fetch ahead: the gradients' lines, then the next head's inputs.
  void plan_prefetch(bool more) {
    prefetcher_.clear();
    prefetcher_.add_writes(row_ptr<T>(problem_.dkey, b_, h_, 0), problem_.dkey.row * kSize, problem_.seqlen_k,
                           problem_.head_dim_qk * kSize);
    prefetcher_.add_writes(row_ptr<T>(problem_.dvalue, b_, h_, 0), problem_.dvalue.row * kSize, problem_.seqlen_k,
                           problem_.head_dim_v * kSize);
    prefetcher_.add_writes(row_ptr<T>(problem_.dquery, b_, h_, 0), problem_.dquery.row * kSize, problem_.seqlen_q,
                           problem_.head_dim_qk * kSize);
    if (more) {
      const int64_t b = (batch_head_ + 1) / problem_.num_heads, h = (batch_head_ + 1) % problem_.num_heads;
      prefetcher_.add_reads(row_ptr<T>(problem_.query, b, h, 0), problem_.query.row * kSize, problem_.seqlen_q,
                            problem_.head_dim_qk * kSize);
      prefetcher_.add_reads(row_ptr<T>(problem_.dout, b, h, 0), problem_.dout.row * kSize, problem_.seqlen_q, problem_.head_dim_v * kSize);
      prefetcher_.add_reads(row_ptr<T>(problem_.out, b, h, 0), problem_.out.row * kSize, problem_.seqlen_q, problem_.head_dim_v * kSize);
      prefetcher_.add_reads(row_ptr<T>(problem_.key, b, h, 0), problem_.key.row * kSize, problem_.seqlen_k, problem_.head_dim_qk * kSize);
      prefetcher_.add_reads(row_ptr<T>(problem_.value, b, h, 0), problem_.value.row * kSize, problem_.seqlen_k,
                            problem_.head_dim_v * kSize);
    }
    const int64_t row_blocks = (bounds_.seqlen_q + kBackwardRows - 1) / kBackwardRows,
                  key_blocks = (bounds_.seqlen_k + kBackwardKeys - 1) / kBackwardKeys;
    const int64_t blocks = problem_.causal == Causal::none ? row_blocks * key_blocks : (row_blocks * key_blocks + 1) / 2;
    prefetcher_.spread_over(blocks * (5 * kBackwardRows / kTileRows));
  }

  // One block of P and dS, and its share of dV, dK and dQ.
  void accumulate(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool add_to_keys) {
    const float *q = queries_ + row0 * query_columns_, *dout = douts_ + row0 * value_columns_;
    const int64_t columns = round_up(keys, kLanes);
    matmul(rows, columns, problem_.head_dim_qk, q, query_columns_, 1, keys_t_, kBackwardKeys, weights_, kScoresRow, false, &prefetcher_);
    matmul(rows, columns, problem_.head_dim_v, dout, value_columns_, 1, values_t_, kBackwardKeys, dscores_, kScoresRow, false,
           &prefetcher_);
    if (problem_.dropout_threshold) {
      dropout_keep_bits(problem_, batch_head_, row0, rows, key0, kKeepWords, keep_, kKeepWords);
      for (int64_t i = 0; i < rows; ++i) weights_row<true>(i, row0 + i, key0, keys);
    } else {
      for (int64_t i = 0; i < rows; ++i) weights_row<false>(i, row0 + i, key0, keys);
    }
    matmul(keys, value_columns_, rows, weights_, 1, kScoresRow, dout, value_columns_, dvalues_, value_columns_, add_to_keys, &prefetcher_);
    matmul(keys, query_columns_, rows, dscores_, 1, kScoresRow, q, query_columns_, dkeys_, query_columns_, add_to_keys, &prefetcher_);
    matmul(rows, query_columns_, keys, dscores_, kScoresRow, 1, keys_, query_columns_, dqueries_ + row0 * query_columns_, query_columns_,
           key0 > 0, &prefetcher_);
  }

  // Row i of the block: scores -> dropout(P) / dropout_scale in weights_, dP -> dS in dscores_; both 0 where the row does not see the key.
  template <bool kDropout>
  FA_MEMBER_INLINE void weights_row(int64_t i, int64_t row, int64_t key0, int64_t keys) {
    float *weights = weights_ + i * kScoresRow, *dscores = dscores_ + i * kScoresRow;
    const bool empty = row_shift_[row] == kInfinity;
    const int64_t visible = empty ? 0 : min_of(visible_keys(problem_, bounds_, row) - key0, keys);
    const float* mask_row = problem_.attn_mask.data && !empty ? row_ptr<const float>(problem_.attn_mask, b_, h_, row) + key0 : nullptr;
    const float* key_bias = holes_ ? key_bias_ + key0 : nullptr;
    const Vec scale = broadcast(log2_scale_), shift = broadcast(row_shift_[row]), factor = broadcast(row_factor_[row]),
              delta = broadcast(delta_[row]);
    const Vec dropout_scale = broadcast(problem_.dropout_scale());
    int64_t j = 0;
    for (; j < visible; j += kLanes) {
      const Vec score = load(weights + j);
      const Vec exponent =
          mask_row || key_bias
              ? sub(biased_scores(score, log2_scale_, mask_row ? mask_row + j : nullptr, key_bias ? key_bias + j : nullptr, visible - j),
                    shift)
              : fmsub(score, scale, shift);
      const LaneMask seen = first_lanes(visible - j);
      Vec weight = keep_where(seen, mul(exp2(exponent), factor)), dweight = load(dscores + j);
      if constexpr (kDropout)
        dweight = keep_where(lanes_of_bits(keep_[i * kKeepWords + j / 16], static_cast<int>(j % 16)), mul(dweight, dropout_scale));
      store(dscores + j, keep_where(seen, mul(weight, sub(dweight, delta))));
      if constexpr (kDropout) weight = keep_where(lanes_of_bits(keep_[i * kKeepWords + j / 16], static_cast<int>(j % 16)), weight);
      store(weights + j, weight);
    }
    for (; j < keys; j += kLanes) {
      store(weights + j, broadcast(0.0f));
      store(dscores + j, broadcast(0.0f));
    }
  }

  void write_keys(int64_t key0, int64_t keys, bool seen) {
    const float* absent = holes_ ? key_bias_ + key0 : nullptr;
    write_rows(problem_.dkey, key0, key0 + keys, problem_.head_dim_qk, seen ? dkeys_ : nullptr, query_columns_, problem_.softmax_scale,
               absent);
    write_rows(problem_.dvalue, key0, key0 + keys, problem_.head_dim_v, seen ? dvalues_ : nullptr, value_columns_, problem_.dropout_scale(),
               absent);
  }

  // gradient[begin, end) = factor * source, or 0 where there is no source or the key is absent.
  void write_rows(const StridedTensor& gradient, int64_t begin, int64_t end, int64_t head_dim, const float* source, int64_t source_row,
                  float factor, const float* absent = nullptr) {
    const Vec vfactor = broadcast(factor);
    for (int64_t row = begin; row < end; ++row) {
      T* to = row_ptr<T>(gradient, b_, h_, row);
      const float* from = source && !is_absent(absent, row - begin) ? source + (row - begin) * source_row : nullptr;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const Vec value = from ? mul(load(from + d), vfactor) : broadcast(0.0f);
        if (d + kLanes <= head_dim)
          store(to + d, value);
        else
          store_first(to + d, value, head_dim - d);
      }
    }
  }

  const AttentionProblem& problem_;
  const int64_t query_columns_, value_columns_;
  const float log2_scale_;
  size_t scratch_bytes_;

  float *queries_, *dqueries_;               // (seqlen_q, query_columns)
  float* douts_;                             // (seqlen_q, value_columns)
  float *row_shift_, *row_factor_, *delta_;  // (seqlen_q,); row_shift is +inf for a row that sees nothing
  float *keys_t_, *values_t_;                // (head_dim, kBackwardKeys), the key block transposed
  float *keys_, *dkeys_;                     // (kBackwardKeys, query_columns)
  float* dvalues_;                           // (kBackwardKeys, value_columns)
  float *weights_, *dscores_;                // (kBackwardRows, kScoresRow)
  float* key_bias_;                          // (seqlen_k,) 0 or -inf
  uint16_t* keep_;                           // (kBackwardRows, kKeepWords) dropout bits

  int64_t b_ = -1, h_ = 0, batch_head_ = 0;
  SequenceBounds bounds_{};
  bool holes_ = false;
  RowPrefetcher prefetcher_;
};

template <class T>
static Plan plan_backward(const AttentionProblem& problem, int /*num_threads*/) {
  return {problem.batch * problem.num_heads, problem.seqlen_q, BackwardPass<T>(problem, nullptr).scratch_bytes()};
}

template <class T>
static void run_backward(const AttentionProblem& problem, const Plan&, int64_t first_task, int64_t last_task, char* scratch) {
  BackwardPass<T>(problem, scratch).run(first_task, last_task);
}

}  // namespace fused_attention::cpu::FA_ISA
