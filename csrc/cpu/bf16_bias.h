// SPDX-License-Identifier: Apache-2.0
// Bias and soft cap of the bf16 backward. Its blocks of scores are transposed, keys x rows, so rows of ScoreBias are transposed 16 x 16 at
// a time, and the mask's gradient is transposed back.
#pragma once
#include "bf16_tiles.h"
#include "score_bias.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kBlockRows = 128, kBlockColumns = 64;  // query rows and keys of one block of transposed scores
constexpr int64_t kScoreStride = kBlockRows + 16;        // elements from one key's scores to the next key's

class TransposedBias {
 public:
  explicit TransposedBias(const AttentionProblem& problem)
      : problem_(problem), scale_(problem.softmax_scale), softcap_(problem), score_bias_(problem) {}

  void carve(Arena& arena) {
    bias_t_ = arena.take<float>(kBlockColumns * kScoreStride);
    rows_ = arena.take<float>(16 * kBlockColumns);
  }

  // dmask: the mask's gradient for this head, or null.
  void enter(const SequenceBounds& bounds, int64_t b, int64_t h, const float* key_bias, float* dmask) {
    score_bias_.enter(bounds, b, h, key_bias);
    bounds_ = &bounds, dmask_ = dmask, slope_sum_ = 0, shared_key0_ = -1;
  }

  // Whether a score depends on more than its product, the scale and the counts of visible keys and rows.
  bool needed(bool mixed) const { return softcap_ || score_bias_.needed_beyond_absent_keys(mixed); }
  bool has_softcap() const { return static_cast<bool>(softcap_); }
  bool wants_gradients() const { return dmask_ || problem_.dalibi_slopes; }
  double slope_sum() const { return slope_sum_; }  // sum of dS * distance over the head so far
  // 1 - tanh^2 after apply(), with a soft cap.
  const float* softcap_derivative() const { return bias_t_; }

  // Turns products S^T (keys, rows) into scores in log2 units, -inf for masked pairs.
  void apply(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed, float* scores) {
    fill(row0, rows, key0, keys, mixed);
    for (int64_t j = 0; j < round_up(keys, 32); ++j)
      for (int64_t i = 0; i < rows; i += 16) {
        const int64_t at = j * kScoreStride + i;
        Vec tanh_of_score = broadcast(0.0f);
        const Vec score = biased_scores(load(scores + at), scale_, softcap_, load(bias_t_ + at), &tanh_of_score);
        store(scores + at, mul(score, broadcast(kLog2e)));
        if (softcap_) store(bias_t_ + at, sub(broadcast(1.0f), mul(tanh_of_score, tanh_of_score)));
      }
  }

  // dscores (keys, rows): the gradient of the scores after the bias was added.
  void add_gradients(int64_t row0, int64_t rows, int64_t key0, int64_t keys, const float* dscores) {
    if (problem_.dalibi_slopes) add_slope_gradient(row0, rows, key0, keys, dscores);
    if (!dmask_) return;
    float* dmask = dmask_ + row0 * problem_.dattn_mask_row + key0 * problem_.dattn_mask_key;
    if (problem_.dattn_mask_row != 0 && problem_.dattn_mask_key != 0)
      add_mask_gradient(row0, rows, keys, dscores, dmask);
    else if (problem_.dattn_mask_key != 0)
      add_key_sums(rows, keys, dscores, dmask);
    else
      add_row_sums(row0, rows, keys, dscores, dmask);
  }

 private:
  void fill(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed) {
    if (score_bias_.same_for_all_rows(mixed)) {
      if (key0 == shared_key0_ && !softcap_) return;
      shared_key0_ = key0;
      fill_row(row0, key0, keys, mixed, rows_);
      for (int64_t j = 0; j < round_up(keys, 32); ++j)
        for (int64_t i = 0; i < kBlockRows; i += 16) store(bias_t_ + j * kScoreStride + i, broadcast(rows_[j]));
      return;
    }
    shared_key0_ = -1;
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t r = 0; r < 16; ++r) fill_row(min_of(row0 + i + r, bounds_->seqlen_q - 1), key0, keys, mixed, rows_ + r * kBlockColumns);
      for (int64_t j = 0; j < round_up(keys, 32); j += 16) {
        __m512i tile[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) tile[r] = _mm512_castps_si512(load(rows_ + r * kBlockColumns + j).x);
        transpose16(tile);
#pragma GCC unroll 16
        for (int n = 0; n < 16; ++n) store(bias_t_ + (j + n) * kScoreStride + i, {_mm512_castsi512_ps(tile[n])});
      }
    }
  }

  // bias (round_up(keys, 32),)
  void fill_row(int64_t row, int64_t key0, int64_t keys, bool mixed, float* bias) const {
    score_bias_.fill(row, key0, keys, mixed, bias);
    if (round_up(keys, 16) % 32 != 0) store(bias + round_up(keys, 16), broadcast(-kInfinity));
  }

  void add_slope_gradient(int64_t row0, int64_t rows, int64_t key0, int64_t keys, const float* dscores) {
    Vec sum = broadcast(0.0f);
    for (int64_t j = 0; j < keys; ++j) {
      const float distance = static_cast<float>(key0 + j - row0 - bounds_->diagonal);
      for (int64_t i = 0; i < rows; i += 16)
        sum = fmadd(load(dscores + j * kScoreStride + i), absolute(sub(broadcast(distance - static_cast<float>(i)), lane_indices())), sum);
    }
    slope_sum_ += reduce_add(sum);
  }

  void add_mask_gradient(int64_t row0, int64_t rows, int64_t keys, const float* dscores, float* dmask) const {
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t j = 0; j < keys; j += 16) {
        __m512i tile[16];
#pragma GCC unroll 16
        for (int n = 0; n < 16; ++n) tile[n] = _mm512_castps_si512(load(dscores + (j + n) * kScoreStride + i).x);
        transpose16(tile);
        const __mmask16 lanes = first_lanes(keys - j);
        const int64_t live = min_of(bounds_->seqlen_q - row0 - i, int64_t{16});
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r)
          if (r < live) {
            float* to = dmask + (i + r) * problem_.dattn_mask_row + j;
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), _mm512_castsi512_ps(tile[r])));
          }
      }
  }

  // For masks that all rows share.
  static void add_key_sums(int64_t rows, int64_t keys, const float* dscores, float* dmask) {
    for (int64_t j = 0; j < keys; ++j) {
      Vec sum = broadcast(0.0f);
      for (int64_t i = 0; i < rows; i += 16) sum = add(sum, load(dscores + j * kScoreStride + i));
      dmask[j] += reduce_add(sum);
    }
  }

  // For masks with one element for all keys, per row or for all rows.
  void add_row_sums(int64_t row0, int64_t rows, int64_t keys, const float* dscores, float* dmask) const {
    for (int64_t i = 0; i < rows; i += 16) {
      Vec sum = broadcast(0.0f);
      for (int64_t j = 0; j < keys; ++j) sum = add(sum, load(dscores + j * kScoreStride + i));
      alignas(64) float sums[16];
      store(sums, sum);
      for (int64_t r = 0; r < min_of(bounds_->seqlen_q - row0 - i, int64_t{16}); ++r) dmask[(i + r) * problem_.dattn_mask_row] += sums[r];
    }
  }

  const AttentionProblem& problem_;
  const float scale_;
  const Softcap softcap_;
  ScoreBias score_bias_;
  const SequenceBounds* bounds_ = nullptr;
  float* dmask_ = nullptr;
  double slope_sum_ = 0;
  int64_t shared_key0_ = -1;  // the key block whose bias, shared by all rows, is in bias_t_
  float* bias_t_ = nullptr;   // (kBlockColumns, kScoreStride)
  float* rows_ = nullptr;     // (16, kBlockColumns)
};

}  // namespace fused_attention::cpu::FA_ISA
