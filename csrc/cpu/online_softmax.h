// SPDX-License-Identifier: Apache-2.0
// Turns the raw products of one query row into the weights that multiply V: scale, soft cap, bias, dropout and the online softmax of
// Milakov and Gimelshein (2018). A weight is one multiply-add, to log2 units and less the row's maximum, and one exp2: only the difference
// is rounded.
#pragma once
#include "dropout.h"
#include "matmul.h"
#include "score_bias.h"

namespace fused_attention::cpu::FA_ISA {

class OnlineSoftmax {
 public:
  OnlineSoftmax(const AttentionProblem& problem, Arena& arena, int64_t score_stride)
      : dropping_(problem.dropout_threshold != 0),
        softmax_scale_(problem.softmax_scale),
        softcap_(problem),
        score_bias_(problem),
        bias_(arena.take<float>(score_stride)) {}

  // key_bias: from fill_key_bias, or null if all keys below seqlen_k are present.
  void enter(const SequenceBounds& bounds, int64_t b, int64_t h, const float* key_bias) {
    bounds_ = &bounds;
    score_bias_.enter(bounds, b, h, key_bias);
  }

  // The rows that follow, from `row` on, have scores for keys [key0, key0 + keys).
  void enter_block(int64_t row, int64_t key0, int64_t keys, bool mixed) {
    key0_ = key0, keys_ = keys, mixed_ = mixed;
    biased_ = softcap_ || score_bias_.needed(mixed);
    same_bias_ = biased_ && score_bias_.same_for_all_rows(mixed);
    if (same_bias_) score_bias_.fill(row, key0, keys, mixed, bias_);
  }

  // Replaces scores (keys,) of a row by exp2(score - row_max), or 0 if the row does not see the key or drops it. Returns the factor that
  // rescales the row's sums over earlier keys. keep: the row's dropout bits, if any.
  FA_NOINLINE_MEMBER float weights(int64_t row, float* scores, float& row_max, float& row_sum, const uint16_t* keep) {
    return biased_ ? biased_weights(row, scores, row_max, row_sum, keep) : plain_weights(row, scores, row_max, row_sum, keep);
  }

 private:
  FA_MEMBER_INLINE float plain_weights(int64_t row, float* scores, float& row_max, float& row_sum, const uint16_t* keep) const {
    const int64_t visible = min_of(visible_keys(*bounds_, row) - key0_, keys_);
    return update(scores, visible, keys_, leading_max(scores, visible), softmax_scale_ * kLog2e, row_max, row_sum, keep);
  }

  FA_MEMBER_INLINE float biased_weights(int64_t row, float* scores, float& row_max, float& row_sum, const uint16_t* keep) {
    const int64_t unseen = min_of(max_of(first_visible_key(*bounds_, row) - key0_, int64_t{0}), keys_) / 16 * 16;
    for (int64_t j = 0; j < unseen; j += kLanes) store(scores + j, broadcast(0.0f));
    const int64_t key0 = key0_ + unseen, keys = keys_ - unseen;
    scores += unseen, keep += unseen / 16;
    const int64_t visible = max_of(min_of(visible_keys(*bounds_, row) - key0, keys), int64_t{0});
    const MaskRow mask = same_bias_ ? MaskRow{} : score_bias_.mask_row(row, key0, mixed_);
    if (!same_bias_ && !mask) score_bias_.fill(row, key0, visible, mixed_, bias_);
    const float* bias = same_bias_ ? bias_ + unseen : bias_;
    const Vec max = with_bias(score_bias_, mask, bias, visible, 1, [&](auto added) FA_LAMBDA_INLINE {
      Vec highest = broadcast(-kInfinity);
      for (int64_t j = 0; j < visible; j += kLanes) {
        const Vec x = biased_scores(load(scores + j), softmax_scale_, softcap_, added(j));
        store(scores + j, x);
        highest = max_of(highest, select(first_lanes(visible - j), x, highest));
      }
      return highest;
    });
    return update(scores, visible, keys, reduce_max(max), kLog2e, row_max, row_sum, keep);
  }

  // highest: the largest of the visible scores. scale: from scores to log2 units.
  FA_MEMBER_INLINE float update(float* scores, int64_t visible, int64_t keys, float highest, float scale, float& row_max, float& row_sum,
                                const uint16_t* keep) const {
    float block_max = highest * scale;
    if (__builtin_fabsf(block_max) > kScaleFirstAbove) {
      for (int64_t j = 0; j < visible; j += kLanes) store(scores + j, mul(load(scores + j), broadcast(scale)));
      scale = 1.0f;
    }
    const float old_max = row_max, new_max = max_of(old_max, block_max);
    const float shift = new_max == -kInfinity ? 0.0f : new_max;  // a row that sees nothing: exp2(-inf - 0) = 0, never NaN
    const float sum = dropping_ ? exponentials<true>(scores, visible, keys, scale, shift, keep)
                                : exponentials<false>(scores, visible, keys, scale, shift, keep);
    const float rescale = row_sum == 0.0f || new_max == old_max ? 1.0f : __builtin_exp2f(old_max - shift);
    row_max = new_max;
    row_sum = row_sum * rescale + sum;
    return rescale;
  }

  static float leading_max(const float* scores, int64_t visible) {
    Vec even = broadcast(-kInfinity), odd = even;
    int64_t j = 0;
    for (; j + 2 * kLanes <= visible; j += 2 * kLanes) {
      even = max_of(even, load(scores + j));
      odd = max_of(odd, load(scores + j + kLanes));
    }
    for (; j < visible; j += kLanes) even = max_of(even, select(first_lanes(visible - j), load(scores + j), even));
    return reduce_max(max_of(even, odd));
  }

  // Replaces visible scores by exp2(scale * score - shift), and dropped ones and the rest up to `keys` by 0. Returns the sum before
  // dropout.
  template <bool kDropping>
  static float exponentials(float* scores, int64_t visible, int64_t keys, float scale, float shift, const uint16_t* keep) {
    const Vec vscale = broadcast(scale), minus_shift = broadcast(-shift);
    const auto weights = [&](int64_t j) __attribute__((always_inline)) { return exp2(fmadd(load(scores + j), vscale, minus_shift)); };
    const auto put = [&](int64_t j, Vec weight) __attribute__((always_inline)) {
      if constexpr (kDropping) weight = keep_where(lanes_of_bits(keep[j / 16], static_cast<int>(j % 16)), weight);
      store(scores + j, weight);
    };
    Vec even = broadcast(0.0f), odd = even;
    int64_t j = 0;
    for (; j + 2 * kLanes <= visible; j += 2 * kLanes) {
      const Vec weight0 = weights(j), weight1 = weights(j + kLanes);
      even = add(even, weight0), odd = add(odd, weight1);
      put(j, weight0), put(j + kLanes, weight1);
    }
    for (; j < visible; j += kLanes) {
      const Vec weight = keep_where(first_lanes(visible - j), weights(j));
      even = add(even, weight);
      put(j, weight);
    }
    for (; j < keys; j += kLanes) store(scores + j, broadcast(0.0f));
    return reduce_add(add(even, odd));
  }

  const bool dropping_;
  const float softmax_scale_;
  const Softcap softcap_;
  ScoreBias score_bias_;
  float* bias_;  // (score_stride,) for one row, or shared by all
  const SequenceBounds* bounds_ = nullptr;
  int64_t key0_ = 0, keys_ = 0;
  bool mixed_ = false, biased_ = false, same_bias_ = false;
};

// (row_max + log2 row_sum) ln 2, rounded once, because the backward recomputes every weight of the row from it. -inf if row_sum is 0.
FA_INLINE Vec natural_lse(Vec row_max, Vec row_sum) {
  const Vec log2_sum = log2(row_sum), total = add(row_max, log2_sum), rest = add(sub(row_max, total), log2_sum);
  const Vec lse = fmadd(total, broadcast(kLn2), fmadd(total, broadcast(kLn2Rest), mul(rest, broadcast(kLn2))));
  return select(less_than(row_sum, broadcast(1e-30f)), broadcast(-kInfinity), lse);
}

// What rounding took from a number that was stored as `rounded`; 0 if that is not finite.
FA_INLINE Vec rounding_error(Vec exact, Vec rounded) {
  const Vec lost = sub(exact, rounded);
  return keep_where(less_than(absolute(lost), broadcast(kInfinity)), lost);
}

// to (head_dim,) = factor * from, or 0 if from is null. from is padded to whole vectors. error (head_dim,): what rounding took, or null.
template <class T>
static void store_row(T* to, const float* from, float factor, int64_t head_dim, T* error = nullptr) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Vec value = from ? mul(load(from + d), broadcast(factor)) : broadcast(0.0f);
    const int64_t remaining = head_dim - d;
    if (remaining >= kLanes) {
      store(to + d, value);
      if (error) store(error + d, rounding_error(value, load(to + d)));
    } else {
      store_first(to + d, value, remaining);
      if (error) store_first(error + d, rounding_error(value, load_first(to + d, remaining)), remaining);
    }
  }
}

FA_INLINE void scale_row(float* row, float factor, int64_t columns) {
  for (int64_t d = 0; d < columns; d += kLanes) store(row + d, mul(load(row + d), broadcast(factor)));
}

}  // namespace fused_attention::cpu::FA_ISA
