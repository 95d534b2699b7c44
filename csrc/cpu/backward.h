// SPDX-License-Identifier: Apache-2.0
// Backward pass with float32 arithmetic; inputs and gradients are stored as float32, bfloat16 or float16. For each query head:
//
//   delta = rowsum(dout * out) - dlse                                             (rows,)
//   for each block of keys, for each block of query rows that sees it:
//     S  = Q K^T,  P = exp2(c S + bias - lse log2 e),  c = scale log2 e           (rows, keys), recomputed from lse
//     dP = dout V^T, dropped entries 0, kept ones times dropout_scale
//     dB = P * (dP - delta)                                                       the gradient of what is added to the scores
//     dS = dB, times 1 - tanh^2 under a soft cap
//     dV += dropout(P)^T dout,   dK += dS^T Q,   dQ += dS K                       dQ is kept for the whole head
//
// Q, dout and dQ of the head live in float32 scratch (3 copies of seqlen_q x head_dim), everything else in blocks of 64 x 64; dK and dV
// of several query heads that share one key head add up in scratch. Where the three copies do not fit a level-2 cache, a block of rows
// meets several blocks of keys in turn. As in FlashAttention (Dao et al., 2022), with the lse gradient folded into delta: d lse / d S = P.
#pragma once

#include "backward_tasks.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBackwardRows = 64, kBackwardKeys = kKeyTile;
constexpr int64_t kMaskRowsAhead = 8;  // a row of a block takes less time than memory

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
        tasks_(problem),
        group_(problem.num_heads / max_of(problem.num_heads_kv, int64_t{1})),
        query_columns_(round_up(problem.head_dim_qk, 16)),
        value_columns_(round_up(problem.head_dim_v, 16)),
        few_rows_(problem.seqlen_q <= kFewRows),
        row_blocks_((problem.seqlen_q + kBackwardRows - 1) / kBackwardRows),
        blocks_together_(key_blocks_together(problem)),
        held_keys_(group_ > 1 ? tasks_.most_keys() : blocks_together_ * kBackwardKeys),
        log2_scale_(problem.softmax_scale * kLog2e),
        softcap_(problem),
        score_bias_(problem) {
    Arena arena(scratch);
    queries_ = arena.take<float>(problem.seqlen_q * query_columns_);
    douts_ = arena.take<float>(problem.seqlen_q * value_columns_);
    dqueries_ = arena.take<float>(problem.seqlen_q * query_columns_);
    row_shift_ = arena.take<float>(problem.seqlen_q);
    row_factor_ = arena.take<float>(problem.seqlen_q);
    delta_ = arena.take<float>(problem.seqlen_q);
    keys_t_ = arena.take<float>(blocks_together_ * kBackwardKeys * query_columns_);
    values_t_ = arena.take<float>(blocks_together_ * kBackwardKeys * value_columns_);
    keys_ = arena.take<float>(blocks_together_ * kBackwardKeys * query_columns_);
    dkeys_ = arena.take<float>(held_keys_ * query_columns_);
    dvalues_ = arena.take<float>(held_keys_ * value_columns_);
    weights_ = arena.take<float>(kBackwardRows * kScoresRow);
    dscores_ = arena.take<float>(kBackwardRows * kScoresRow);
    bias_ = arena.take<float>(kScoresRow);
    key_bias_ = arena.take<float>(problem.key_mask ? round_up(problem.seqlen_k, kBackwardKeys) : 0);
    keep_ = arena.take<uint16_t>(kBackwardRows * kKeepWords);
    rows_started_ = arena.take<uint8_t>(row_blocks_);
    keys_started_ = arena.take<uint8_t>(held_keys_ / kBackwardKeys);
    if (problem.row_tiles.data) tile_kinds_ = arena.take<uint8_t>(row_blocks_ * problem.row_tiles.num_tiles);
    scratch_bytes_ = arena.used();
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void run(int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task)
      tasks_.for_each_head(task, [&](int64_t b, int64_t h_kv, bool) { run_key_head(task, b, h_kv, task + 1 < last_task); });
  }

 private:
  static constexpr int64_t kScoresRow = kBackwardKeys + 16, kKeepWords = kBackwardKeys / 16, kSize = sizeof(T);

  void run_key_head(int64_t task, int64_t b, int64_t h_kv, bool more) {
    enter(b, h_kv);
    const KeyRange range = tasks_.keys(task, bounds_.seqlen_k);
    for (int64_t n = 0; n < held_keys_ / kBackwardKeys; ++n) keys_started_[n] = 0;
    for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
      const bool last_head = h + 1 == (h_kv + 1) * group_;
      enter_head(task, h);
      load_rows();
      if (problem_.dsinks && tasks_.split(task) == 0)
        store_sink_gradient(problem_, b_, h_, problem_.lse + lse_offset(problem_, bounds_, b_, h_), delta_, bounds_.seqlen_q);
      plan_prefetch(more && last_head);
      for (int64_t key0 = range.first; key0 < range.last; key0 += blocks_together_ * kBackwardKeys) {
        const int64_t keys = min_of(blocks_together_ * kBackwardKeys, range.last - key0);
        held_ = group_ > 1 ? key0 - range.first : 0;
        for (int64_t n = 0; group_ == 1 && n < blocks_together_; ++n) keys_started_[n] = 0;
        attend(key0, keys);
        for (int64_t j = 0; last_head && j < keys; j += kBackwardKeys) write_keys(key0 + j, min_of(kBackwardKeys, keys - j), held_ + j);
      }
      if (problem_.dalibi_slopes)
        problem_.dalibi_slopes[batch_head_ * problem_.num_key_splits + tasks_.split(task)] = static_cast<float>(-slope_sum_);
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
    score_bias_.enter(bounds_, b_, h, holes_ ? key_bias_ : nullptr);
    slope_sum_ = 0;
    dmask_ = tasks_.mask_gradient(task);
    if (dmask_) dmask_ += b_ * problem_.dattn_mask_batch + h * problem_.dattn_mask_head;
    for (int64_t block = 0; block < row_blocks_; ++block) {
      rows_started_[block] = 0;
      if (tile_kinds_) expand_tiles(problem_.row_tiles, b_, h, block, tile_kinds_ + block * problem_.row_tiles.num_tiles);
    }
  }

  // Packs Q and dout, computes delta, and how each row recomputes P: exp2(score - row_shift) * row_factor.
  void load_rows() {
    const int64_t rows = bounds_.seqlen_q;
    pack_rows<T>(query_row(problem_.query, 0), problem_.query.row, rows, problem_.head_dim_qk, queries_, query_columns_);
    pack_rows<T>(query_row(problem_.dout, 0), problem_.dout.row, rows, problem_.head_dim_v, douts_, value_columns_);
    const int64_t offset = lse_offset(problem_, bounds_, b_, h_);
    const float *lse = problem_.lse + offset, *dlse = problem_.dlse ? problem_.dlse + offset : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      float* dout = douts_ + i * value_columns_;
      if (lse[i] == -kInfinity) {  // the row sees nothing: no gradient, whatever is stored in it
        row_shift_[i] = kInfinity;
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
      delta_[i] = reduce_add(sum) - (dlse ? dlse[i] : 0.0f);
      // lse log2 e does not fit a float32; what rounding takes from it is put back as a factor.
      const float shift = lse[i] * kLog2e, lost = __builtin_fmaf(lse[i], kLog2e, -shift) + lse[i] * kLog2eRest;
      row_shift_[i] = shift;
      row_factor_[i] = 1.0f - lost * kLn2;
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
    const int64_t blocks = problem_.causal == Causal::none ? row_blocks * key_blocks : (row_blocks * key_blocks + 1) / 2;
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
    const int64_t columns = round_up(keys, kLanes), held = held_ + place;
    if (few_rows_) {
      matmul_few_rows(rows, keys, query_columns_, q, query_columns_, packed_keys, query_columns_, weights_, kScoresRow);
      matmul_few_rows(rows, keys, value_columns_, dout, value_columns_, values_t, value_columns_, dscores_, kScoresRow);
    } else {
      matmul(rows, columns, problem_.head_dim_qk, q, query_columns_, 1, keys_t, kBackwardKeys, weights_, kScoresRow, false, &prefetcher_);
      matmul(rows, columns, problem_.head_dim_v, dout, value_columns_, 1, values_t, kBackwardKeys, dscores_, kScoresRow, false,
             &prefetcher_);
    }
    if (problem_.dropout_threshold) {
      dropout_keep_bits(problem_, batch_head_, row0, rows, key0, kKeepWords, keep_, kKeepWords);
      softmax_gradient<true>(row0, rows, key0, keys, mixed);
    } else {
      softmax_gradient<false>(row0, rows, key0, keys, mixed);
    }
    uint8_t &keys_started = keys_started_[held / kBackwardKeys], &rows_started = rows_started_[row0 / kBackwardRows];
    matmul(keys, value_columns_, rows, weights_, 1, kScoresRow, dout, value_columns_, dvalues_ + held * value_columns_, value_columns_,
           keys_started != 0, &prefetcher_);
    matmul(keys, query_columns_, rows, dscores_, 1, kScoresRow, q, query_columns_, dkeys_ + held * query_columns_, query_columns_,
           keys_started != 0, &prefetcher_);
    matmul(rows, query_columns_, keys, dscores_, kScoresRow, 1, packed_keys, query_columns_, dqueries_ + row0 * query_columns_,
           query_columns_, rows_started != 0, &prefetcher_);
    keys_started = rows_started = 1;
  }

  template <bool kDropout>
  void softmax_gradient(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed) {
    if (!softcap_ && !score_bias_.needed(mixed)) {
      for (int64_t i = 0; i < rows; ++i) weights_row<kDropout>(i, row0 + i, key0, keys);
      return;
    }
    const bool same = score_bias_.same_for_all_rows(mixed);
    if (same) score_bias_.fill(row0, key0, keys, mixed, bias_);
    Vec slope_sum = broadcast(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const MaskRow mask = same ? MaskRow{} : score_bias_.mask_row(row0 + i, key0, mixed);
      if (!same && !mask) score_bias_.fill(row0 + i, key0, keys, mixed, bias_);
      with_bias(score_bias_, mask, bias_, visible_keys(bounds_, row0 + i) - key0, kMaskRowsAhead,
                [&](auto added) FA_LAMBDA_INLINE { biased_weights_row<kDropout>(i, row0 + i, key0, keys, added, slope_sum); });
    }
    slope_sum_ += reduce_add(slope_sum);
  }

  // Row i of the block: scores -> dropout(P) / dropout_scale in weights_, dP -> dS in dscores_; both 0 where the row does not see the key.
  template <bool kDropout>
  FA_MEMBER_INLINE void weights_row(int64_t i, int64_t row, int64_t key0, int64_t keys) {
    float *weights = weights_ + i * kScoresRow, *dscores = dscores_ + i * kScoresRow;
    const bool empty = row_shift_[row] == kInfinity;
    const int64_t visible = empty ? 0 : min_of(visible_keys(bounds_, row) - key0, keys);
    const Vec scale = broadcast(log2_scale_), shift = broadcast(row_shift_[row]), factor = broadcast(row_factor_[row]),
              delta = broadcast(delta_[row]), dropout_scale = broadcast(problem_.dropout_scale());
    int64_t j = 0;
    for (; j < visible; j += kLanes) {
      const LaneMask seen = first_lanes(visible - j);
      Vec weight = keep_where(seen, mul(exp2(fmsub(load(weights + j), scale, shift)), factor)), dweight = load(dscores + j);
      if constexpr (kDropout) dweight = keep_where(kept(i, j), mul(dweight, dropout_scale));
      store(dscores + j, keep_where(seen, mul(weight, sub(dweight, delta))));
      if constexpr (kDropout) weight = keep_where(kept(i, j), weight);
      store(weights + j, weight);
    }
    for (; j < keys; j += kLanes) {
      store(weights + j, broadcast(0.0f));
      store(dscores + j, broadcast(0.0f));
    }
  }

  // The same with a soft cap or with something added to the scores, whose gradients are added up on the way.
  template <bool kDropout, class Added>
  void biased_weights_row(int64_t i, int64_t row, int64_t key0, int64_t keys, const Added& added, Vec& slope_sum) {
    float *weights = weights_ + i * kScoresRow, *dscores = dscores_ + i * kScoresRow;
    const bool empty = row_shift_[row] == kInfinity;
    const Vec shift = broadcast(row_shift_[row]), factor = broadcast(row_factor_[row]), delta = broadcast(delta_[row]),
              dropout_scale = broadcast(problem_.dropout_scale()), zero = broadcast(0.0f);
    float* dmask = dmask_ ? dmask_ + row * problem_.dattn_mask_row + key0 * problem_.dattn_mask_key : nullptr;
    const int64_t visible = empty ? 0 : min_of(visible_keys(bounds_, row) - key0, keys);
    Vec row_sum = zero;
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Vec bias = select(first_lanes(visible - j), added(j), broadcast(-kInfinity));
      const LaneMask masked = less_than(bias, broadcast(kMaskedBelow));
      Vec tanh_of_score = zero;
      const Vec score = biased_scores(load(weights + j), log2_scale_, softcap_, bias, &tanh_of_score);
      Vec weight = select(masked, zero, mul(exp2(sub(score, shift)), factor)), dweight = load(dscores + j);
      if constexpr (kDropout) dweight = keep_where(kept(i, j), mul(dweight, dropout_scale));
      const Vec dbias = select(masked, zero, mul(weight, sub(dweight, delta)));
      store(dscores + j, softcap_ ? mul(dbias, sub(broadcast(1.0f), mul(tanh_of_score, tanh_of_score))) : dbias);
      if constexpr (kDropout) weight = keep_where(kept(i, j), weight);
      store(weights + j, weight);
      if (dmask && problem_.dattn_mask_key == 0) row_sum = add(row_sum, dbias);
      if (dmask && problem_.dattn_mask_key != 0) add_to(dmask + j, dbias, keys - j);
      if (problem_.dalibi_slopes) slope_sum = fmadd(dbias, score_bias_.distances(row, key0 + j), slope_sum);
    }
    if (dmask && problem_.dattn_mask_key == 0) dmask[0] += reduce_add(row_sum);
  }

  static FA_MEMBER_INLINE void add_to(float* to, Vec value, int64_t remaining) {
    if (remaining >= kLanes)
      store(to, add(load(to), value));
    else
      store_first(to, add(load_first(to, remaining), value), remaining);
  }

  FA_MEMBER_INLINE LaneMask kept(int64_t i, int64_t j) const {
    return lanes_of_bits(keep_[i * kKeepWords + j / 16], static_cast<int>(j % 16));
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
  const BackwardTasks tasks_;
  const int64_t group_;  // query heads to a key head
  const int64_t query_columns_, value_columns_;
  const bool few_rows_;
  const int64_t row_blocks_;
  const int64_t blocks_together_;  // of keys
  const int64_t held_keys_;        // whose dK and dV are held at a time: those blocks, or all of the task for several query heads
  const float log2_scale_;
  const Softcap softcap_;
  ScoreBias score_bias_;
  size_t scratch_bytes_;

  float *queries_, *dqueries_;               // (seqlen_q, query_columns)
  float* douts_;                             // (seqlen_q, value_columns)
  float *row_shift_, *row_factor_, *delta_;  // (seqlen_q,); row_shift is +inf for a row that sees nothing
  float *keys_t_, *values_t_;                // (blocks_together, head_dim, kBackwardKeys), keys transposed; V as it is for a few rows
  float* keys_;                              // (blocks_together, kBackwardKeys, query_columns)
  float* dkeys_;                             // (held_keys, query_columns)
  float* dvalues_;                           // (held_keys, value_columns)
  float *weights_, *dscores_;                // (kBackwardRows, kScoresRow)
  float* bias_;                              // (kBackwardKeys,) of one row, or of all
  float* key_bias_;                          // (seqlen_k,) 0 or -inf
  uint16_t* keep_;                           // (kBackwardRows, kKeepWords) dropout bits
  uint8_t *rows_started_, *keys_started_;    // per block: dqueries_, dkeys_ and dvalues_ hold something
  uint8_t* tile_kinds_ = nullptr;            // (row_blocks, tiles) of the head

  int64_t b_ = -1, h_ = 0, h_kv_ = 0, batch_head_ = 0, held_ = 0;
  SequenceBounds bounds_{};
  bool holes_ = false;
  float* dmask_ = nullptr;  // of this head in this task's part
  double slope_sum_ = 0;
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
