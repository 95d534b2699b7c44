// SPDX-License-Identifier: Apache-2.0
// The backward's counterpart of online_softmax.h. Turns a block's raw products S = Q K^T and dP = dout V^T into what multiplies dout, Q, K:
//
//   P  = exp2(c S + bias - lse log2 e),  c = scale log2 e               recomputed from lse
//   dB = P * (dropout(dP) - delta)                                      gradient of the bias
//   dS = dB, times 1 - tanh^2 with a soft cap
//
// and accumulates the gradients of attn_mask and alibi_slopes along the way.
#pragma once
#include "dropout.h"
#include "matmul.h"
#include "score_bias.h"

namespace fused_attention::cpu::FA_ISA {

class SoftmaxGradient {
 public:
  static constexpr int64_t kRows = 64, kScoreStride = kKeyTile + 16;

  // lines: how many rows of blocks lie in scratch at once, of one or more heads.
  SoftmaxGradient(const AttentionProblem& problem, Arena& arena, int64_t lines = kRows)
      : problem_(problem), score_scale_(problem.softmax_scale * kLog2e), softcap_(problem), score_bias_(problem) {
    row_shift_ = arena.take<float>(problem.seqlen_q);
    row_lse_ = arena.take<float>(problem.seqlen_q);
    row_factor_ = arena.take<float>(problem.seqlen_q);
    delta_ = arena.take<float>(problem.seqlen_q);
    weights_ = arena.take<float>(lines * kScoreStride);
    dscores_ = arena.take<float>(lines * kScoreStride);
    bias_ = arena.take<float>(kScoreStride);
    keep_bits_ = arena.take<uint16_t>(kRows * kKeepWords);
  }

  // (lines, kScoreStride) in: S. Out: dropout(P) / dropout_scale.
  float* weights() const { return weights_; }
  // (lines, kScoreStride) in: dP. Out: dS.
  float* dscores() const { return dscores_; }
  const float* delta() const { return delta_; }  // (seqlen_q,)

  // key_bias: from fill_key_bias, or null if all keys below seqlen_k are present. dmask: the mask's gradient for this head, or null.
  void enter(const SequenceBounds& bounds, int64_t b, int64_t h, const float* key_bias, float* dmask) {
    bounds_ = &bounds, batch_head_ = b * problem_.num_heads + h, dmask_ = dmask, slope_sum_ = 0;
    score_bias_.enter(bounds, b, h, key_bias);
  }

  void enter_row(int64_t row, float lse, float delta) {
    delta_[row] = delta;
    // lse log2 e is not exact in float32; the rounding error is put back as a factor.
    const float shift = lse * kLog2e, lost = __builtin_fmaf(lse, kLog2e, -shift) + lse * kLog2eRest;
    row_shift_[row] = shift, row_lse_[row] = lse;
    row_factor_[row] = 1.0f - lost * kLn2;
  }

  void enter_row_that_sees_nothing(int64_t row) { row_shift_[row] = kInfinity; }

  // The gradient of the head's slope, over the blocks so far.
  float dslope() const { return static_cast<float>(-slope_sum_); }

  // line0: where the block's first row lies.
  FA_NOINLINE_MEMBER void apply(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed, int64_t line0 = 0) {
    line0_ = line0;
    if (problem_.dropout_threshold) {
      dropout_keep_bits(problem_, batch_head_, row0, rows, key0, kKeepWords, keep_bits_, kKeepWords);
      apply_to_rows<true>(row0, rows, key0, keys, mixed);
    } else {
      apply_to_rows<false>(row0, rows, key0, keys, mixed);
    }
  }

 private:
  static constexpr int64_t kKeepWords = kKeyTile / 16;
  static constexpr int64_t kMaskRowsAhead = 8;  // processing one row takes less time than a memory access

  template <bool kDropping>
  void apply_to_rows(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed) {
    if (!softcap_ && !score_bias_.needed(mixed)) {
      for (int64_t i = 0; i < rows; ++i) weights_row<kDropping>(i, row0 + i, key0, keys);
      return;
    }
    const bool same = score_bias_.same_for_all_rows(mixed);
    if (same) score_bias_.fill(row0, key0, keys, mixed, bias_);
    Vec slope_sum = broadcast(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      const MaskRow mask = same ? MaskRow{} : score_bias_.mask_row(row0 + i, key0, mixed);
      if (!same && !mask) score_bias_.fill(row0 + i, key0, keys, mixed, bias_);
      with_bias(score_bias_, mask, bias_, visible_keys(*bounds_, row0 + i) - key0, kMaskRowsAhead,
                [&](auto added) FA_LAMBDA_INLINE { biased_weights_row<kDropping>(i, row0 + i, key0, keys, added, slope_sum); });
    }
    slope_sum_ += reduce_add(slope_sum);
  }

  // Row i of the block: scores -> dropout(P) / dropout_scale in weights_, dP -> dS in dscores_; both 0 for keys the row does not see.
  template <bool kDropping>
  FA_MEMBER_INLINE void weights_row(int64_t i, int64_t row, int64_t key0, int64_t keys) {
    float *weights = weights_ + (line0_ + i) * kScoreStride, *dscores = dscores_ + (line0_ + i) * kScoreStride;
    const bool empty = row_shift_[row] == kInfinity;
    const int64_t visible = empty ? 0 : min_of(visible_keys(*bounds_, row) - key0, keys);
    const Vec scale = broadcast(score_scale_), shift = broadcast(row_shift_[row]), factor = broadcast(row_factor_[row]),
              delta = broadcast(delta_[row]), dropout_scale = broadcast(problem_.dropout_scale());
    int64_t j = 0;
    for (; j < visible; j += kLanes) {
      const LaneMask seen = first_lanes(visible - j);
      Vec weight = keep_where(seen, mul(exp2(fmsub(load(weights + j), scale, shift)), factor)), dweight = load(dscores + j);
      if constexpr (kDropping) dweight = keep_where(kept(i, j), mul(dweight, dropout_scale));
      store(dscores + j, keep_where(seen, mul(weight, sub(dweight, delta))));
      if constexpr (kDropping) weight = keep_where(kept(i, j), weight);
      store(weights + j, weight);
    }
    for (; j < keys; j += kLanes) {
      store(weights + j, broadcast(0.0f));
      store(dscores + j, broadcast(0.0f));
    }
  }

  // The same with a soft cap or a bias, whose gradients are accumulated along the way.
  template <bool kDropping, class Added>
  void biased_weights_row(int64_t i, int64_t row, int64_t key0, int64_t keys, const Added& added, Vec& slope_sum) {
    float *weights = weights_ + (line0_ + i) * kScoreStride, *dscores = dscores_ + (line0_ + i) * kScoreStride;
    const bool empty = row_shift_[row] == kInfinity;
    const WeightOfScore weight_of(row_lse_[row]);
    const Vec delta = broadcast(delta_[row]), dropout_scale = broadcast(problem_.dropout_scale()), zero = broadcast(0.0f);
    float* dmask = dmask_ ? dmask_ + row * problem_.dattn_mask_row + key0 * problem_.dattn_mask_key : nullptr;
    const int64_t visible = empty ? 0 : min_of(visible_keys(*bounds_, row) - key0, keys);
    Vec row_sum = zero;
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Vec bias = select(first_lanes(visible - j), added(j), broadcast(-kInfinity));
      const LaneMask masked = less_than(bias, broadcast(kMaskedBelow));
      Vec tanh_of_score = zero;
      const Vec score = biased_scores(load(weights + j), problem_.softmax_scale, softcap_, bias, &tanh_of_score);
      Vec weight = select(masked, zero, weight_of(score)), dweight = load(dscores + j);
      if constexpr (kDropping) dweight = keep_where(kept(i, j), mul(dweight, dropout_scale));
      const Vec dbias = select(masked, zero, mul(weight, sub(dweight, delta)));
      store(dscores + j, softcap_ ? mul(dbias, sub(broadcast(1.0f), mul(tanh_of_score, tanh_of_score))) : dbias);
      if constexpr (kDropping) weight = keep_where(kept(i, j), weight);
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
    return lanes_of_bits(keep_bits_[i * kKeepWords + j / 16], static_cast<int>(j % 16));
  }

  const AttentionProblem& problem_;
  const float score_scale_;
  const Softcap softcap_;
  ScoreBias score_bias_;

  float *row_shift_, *row_factor_, *row_lse_, *delta_;  // (seqlen_q,); row_shift is +inf for a row that sees nothing
  float *weights_, *dscores_;                           // (lines, kScoreStride)
  float* bias_;                                         // (kKeyTile,) for one row, or shared by all
  uint16_t* keep_bits_;                                 // (kRows, kKeepWords) dropout bits

  const SequenceBounds* bounds_ = nullptr;
  int64_t batch_head_ = 0, line0_ = 0;
  float* dmask_ = nullptr;
  double slope_sum_ = 0;
};

// sum + row * dout, over the head dim of the values; lanes of partial sums. dout: in float32, padded to whole vectors.
template <class T>
FA_INLINE Vec add_products(const T* row, const float* dout, int64_t head_dim, Vec sum) {
  for (int64_t d = 0; d < head_dim; d += kLanes)
    sum = fmadd(d + kLanes <= head_dim ? load(row + d) : load_first(row + d, head_dim - d), load(dout + d), sum);
  return sum;
}

// rowsum(dout * (out + out_error)) - dlse of a row. dout: (head_dim_v,) in float32, padded to whole vectors.
template <class T>
static float row_delta(const AttentionProblem& problem, const SequenceBounds& bounds, int64_t b, int64_t h, int64_t row,
                       const float* dout) {
  const int64_t token = bounds.first_query + row;
  Vec sum = add_products(row_ptr<const T>(problem.out, b, h, token), dout, problem.head_dim_v, broadcast(0.0f));
  if (problem.out_error.data) sum = add_products(row_ptr<const T>(problem.out_error, b, h, token), dout, problem.head_dim_v, sum);
  return reduce_add(sum) - (problem.dlse ? problem.dlse[lse_offset(problem, bounds, b, h) + row] : 0.0f);
}

}  // namespace fused_attention::cpu::FA_ISA
