// SPDX-License-Identifier: Apache-2.0
// What is added to the scores of one row: attn_mask of any dtype and stride, ALiBi, and -inf for keys the row may not attend
// to (masked or absent keys, bits of a PreparedMask, keys outside the causal or window bounds). If there are only masks, the kernels read
// them in place, in their own dtype (MaskRow); otherwise they read a row of float32 that holds everything (fill).
#pragma once
#include "mask.h"

namespace fused_attention::cpu::FA_ISA {

constexpr float kMaskedBelow = -1e30f;  // attn_mask values below it mask, as -inf does

// The soft cap, s -> softcap * tanh(s / softcap), from raw products Q K^T to scores.
struct Softcap {
  float inner, outer;  // x = outer * tanh(inner * product)
  explicit Softcap(const AttentionProblem& problem)
      : inner(problem.softcap != 0.0f ? problem.softmax_scale / problem.softcap : 0.0f), outer(problem.softcap) {}
  explicit operator bool() const { return outer != 0.0f; }
};

// The masks of one row, starting at some key.
struct MaskRow {
  const char* attn_mask;  // in its own dtype, or null
  const float* key_bias;  // from fill_key_bias, or null
  const uint32_t* bits;   // of a PreparedMask, or null
  int64_t bit0;           // the first key's bit in the first word, 0 or 16
  const float* plain;     // attn_mask if it is float32 and the only mask, or null
  explicit operator bool() const { return attn_mask || bits; }
};

class ScoreBias {
 public:
  explicit ScoreBias(const AttentionProblem& problem)
      : problem_(problem),
        mask_element_(problem.attn_mask_dtype == MaskDtype::float32   ? 4
                      : problem.attn_mask_dtype == MaskDtype::boolean ? 1
                                                                      : 2) {}

  // key_bias: from fill_key_bias, or null if all keys below seqlen_k are present.
  void enter(const SequenceBounds& bounds, int64_t b, int64_t h, const float* key_bias) {
    bounds_ = &bounds, batch_ = b, head_ = h, key_bias_ = key_bias;
    slope_ = problem_.alibi_slopes ? problem_.alibi_slopes[b * problem_.alibi_slopes_batch + h * problem_.alibi_slopes_head] : 0.0f;
  }

  // Whether a score depends on more than its product and `visible_keys`. mixed: tiles of a PreparedMask that need their bits.
  bool needed(bool mixed) const { return key_bias_ || needed_beyond_absent_keys(mixed); }
  bool needed_beyond_absent_keys(bool mixed) const {
    return problem_.attn_mask.data || problem_.alibi_slopes || problem_.window_left < kUnlimited || mixed;
  }
  bool same_for_all_rows(bool mixed) const {
    return !(mixed || problem_.alibi_slopes || has_diagonal(problem_) || (problem_.attn_mask.data && problem_.attn_mask.row != 0));
  }

  // The row's masks if there is nothing else to add and attn_mask is contiguous along keys, else null. key0 is a multiple of 16.
  FA_MEMBER_INLINE MaskRow mask_row(int64_t row, int64_t key0, bool mixed) const {
    const bool alone = !problem_.alibi_slopes && problem_.window_left >= kUnlimited && !mask_elements_lie_apart();
    return alone ? masks_from(row, key0, mixed) : MaskRow{};
  }

  // kLanes values of such a row from j on, of which `remaining` exist. Also prefetches a later row: rows are too far apart for the hardware
  // prefetcher.
  FA_MEMBER_INLINE Vec mask_values(const MaskRow& row, int64_t j, int64_t remaining, int64_t rows_ahead) const {
    if (!row.attn_mask) return without_hidden(row, j, broadcast(0.0f));
    const char* elements = row.attn_mask + j * mask_element_;
    __builtin_prefetch(elements + rows_ahead * problem_.attn_mask.row * mask_element_);
    return without_hidden(row, j, attn_mask_values(elements, remaining));
  }

  // The same for a float32 mask that is the only one.
  FA_MEMBER_INLINE Vec mask_values(const float* plain, int64_t remaining, int64_t rows_ahead) const {
    __builtin_prefetch(plain + rows_ahead * problem_.attn_mask.row);
    return float_values(plain, remaining);
  }

  // Fills bias[0, keys) for the keys from key0 on, then -inf up to the next multiple of 16.
  FA_NOINLINE_MEMBER void fill(int64_t row, int64_t key0, int64_t keys, bool mixed, float* bias) const {
    const int64_t padded = round_up(keys, 16);
    const MaskRow masks = masks_from(row, key0, mixed);
    for (int64_t j = 0; j < padded; j += kLanes)
      store(bias + j, mask_elements_lie_apart() ? without_hidden(masks, j, gathered_values(attn_mask(row, key0 + j), keys - j))
                                                : mask_values(masks, j, keys - j, 1));
    if (problem_.alibi_slopes) {
      const Vec slope = broadcast(-slope_);
      for (int64_t j = 0; j < padded; j += kLanes) store(bias + j, fmadd(distances(row, key0 + j), slope, load(bias + j)));
    }
    const int64_t first = first_visible_key(*bounds_, row) - key0, last = min_of(visible_keys(*bounds_, row) - key0, keys);
    for (int64_t j = 0; j < min_of(first, padded); j += kLanes)
      store(bias + j, select(first_lanes(first - j), broadcast(-kInfinity), load(bias + j)));
    for (int64_t j = max_of(last, int64_t{0}) / kLanes * kLanes; j < padded; j += kLanes)
      store(bias + j, select(first_lanes(last - j), load(bias + j), broadcast(-kInfinity)));
  }

  // |j - i - diagonal| for row i and kLanes keys from j on.
  FA_MEMBER_INLINE Vec distances(int64_t row, int64_t key) const {
    return absolute(add(broadcast(static_cast<float>(key - row - bounds_->diagonal)), lane_indices()));
  }

 private:
  const char* attn_mask(int64_t row, int64_t key) const {
    return static_cast<const char*>(problem_.attn_mask.data) + (batch_ * problem_.attn_mask.batch + head_ * problem_.attn_mask.head +
                                                                row * problem_.attn_mask.row + key * problem_.attn_mask_key) *
                                                                   mask_element_;
  }
  bool mask_elements_lie_apart() const { return problem_.attn_mask.data && problem_.attn_mask_key != 1; }

  MaskRow masks_from(int64_t row, int64_t key0, bool mixed) const {
    const BitMask& bits = problem_.mask_bits;
    const char* mask = problem_.attn_mask.data ? attn_mask(row, key0) : nullptr;
    const bool plain = problem_.attn_mask_dtype == MaskDtype::float32 && !key_bias_ && !mixed;
    return {mask, key_bias_ ? key_bias_ + key0 : nullptr,
            mixed ? bits.data + batch_ * bits.batch + head_ * bits.head + row * bits.line + key0 / 32 : nullptr, key0 % 32,
            plain ? reinterpret_cast<const float*>(mask) : nullptr};
  }

  // The values, or -inf for absent keys and keys whose bit is not set.
  FA_MEMBER_INLINE static Vec without_hidden(const MaskRow& row, int64_t j, Vec values) {
    if (row.key_bias) values = select(less_than(load(row.key_bias + j), broadcast(0.0f)), broadcast(-kInfinity), values);
    if (row.bits) {
      const int64_t bit = row.bit0 + j;
      const uint16_t bits = static_cast<uint16_t>(row.bits[bit / 32] >> (bit % 32 / 16 * 16));
      values = select(lanes_of_bits(bits, static_cast<int>(bit % 16)), values, broadcast(-kInfinity));
    }
    return values;
  }

  // kLanes contiguous elements of attn_mask, of which `remaining` exist.
  FA_MEMBER_INLINE Vec attn_mask_values(const char* elements, int64_t remaining) const {
    switch (problem_.attn_mask_dtype) {
      case MaskDtype::float32:
        return float_values(reinterpret_cast<const float*>(elements), remaining);
      case MaskDtype::bfloat16:
        return float_values(reinterpret_cast<const bfloat16_t*>(elements), remaining);
      case MaskDtype::float16:
        return float_values(reinterpret_cast<const float16_t*>(elements), remaining);
      case MaskDtype::boolean:
        break;
    }
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(elements);
    return select(remaining >= kLanes ? nonzero_lanes(bytes) : nonzero_lanes(bytes, remaining), broadcast(0.0f), broadcast(-kInfinity));
  }
  template <class T>
  FA_MEMBER_INLINE static Vec float_values(const T* values, int64_t remaining) {
    return remaining >= kLanes ? load(values) : load_first(values, max_of(remaining, int64_t{0}));
  }

  // The same for strided elements.
  Vec gathered_values(const char* elements, int64_t remaining) const {
    const int64_t count = max_of(min_of(remaining, int64_t{kLanes}), int64_t{0});
    switch (mask_element_) {
      case 1:
        return gathered_values(reinterpret_cast<const uint8_t*>(elements), count);
      case 2:
        return gathered_values(reinterpret_cast<const uint16_t*>(elements), count);
      default:
        return gathered_values(reinterpret_cast<const uint32_t*>(elements), count);
    }
  }
  template <class Bits>
  Vec gathered_values(const Bits* elements, int64_t count) const {
    char gathered[kLanes * sizeof(float)] = {};
    for (int64_t n = 0; n < count; ++n) __builtin_memcpy(gathered + n * sizeof(Bits), elements + n * problem_.attn_mask_key, sizeof(Bits));
    return attn_mask_values(gathered, count);
  }

  const AttentionProblem& problem_;
  const int64_t mask_element_;  // size of an attn_mask element in bytes
  const SequenceBounds* bounds_ = nullptr;
  int64_t batch_ = 0, head_ = 0;
  const float* key_bias_ = nullptr;
  float slope_ = 0.0f;
};

// Calls visit(values), where values(j) is what to add to the scores of kLanes keys from j on, read from `mask`, or from `bias` if `mask` is
// null. Each way of reading gets its own loop.
template <class Visit>
FA_INLINE auto with_bias(const ScoreBias& score_bias, const MaskRow& mask, const float* bias, int64_t visible, int64_t rows_ahead,
                         Visit&& visit) {
  if (mask.plain) return visit([&](int64_t j) FA_LAMBDA_INLINE { return score_bias.mask_values(mask.plain + j, visible - j, rows_ahead); });
  if (mask) return visit([&](int64_t j) FA_LAMBDA_INLINE { return score_bias.mask_values(mask, j, visible - j, rows_ahead); });
  return visit([&](int64_t j) FA_LAMBDA_INLINE { return load(bias + j); });
}

// kLanes scores from products, -inf if the bias is. Not in log2 units: that would round twice, the bias and then the sum, and large scores
// lose as much as their size. tanh_of_score: receives the soft cap's tanh, for its derivative.
FA_INLINE Vec biased_scores(Vec product, float softmax_scale, const Softcap& softcap, Vec bias, Vec* tanh_of_score = nullptr) {
  Vec x;
  if (softcap) {
    const Vec t = tanh(mul(product, broadcast(softcap.inner)));
    if (tanh_of_score) *tanh_of_score = t;
    x = fmadd(t, broadcast(softcap.outer), bias);
  } else {
    x = fmadd(product, broadcast(softmax_scale), bias);
  }
  return select(less_than(bias, broadcast(kMaskedBelow)), broadcast(-kInfinity), x);
}

// exp(score - lse) for one row. The forward turned scores to log2 units with the rounded log2 e, and lse back with the exact one.
struct WeightOfScore {
  float lse, lost;
  explicit WeightOfScore(float row_lse) : lse(row_lse), lost(__builtin_fabsf(lse) < kScaleFirstAbove ? lse * kLog2eRest : 0.0f) {}
  FA_MEMBER_INLINE Vec operator()(Vec score) const { return exp2(fmsub(sub(score, broadcast(lse)), broadcast(kLog2e), broadcast(lost))); }
};

// The kinds of a PreparedMask's tiles of 64 keys, for one block of 64 rows.
enum TileKind : uint8_t { kEmptyTile = 0, kFullTile = 1, kMixedTile = 2 };

static inline void expand_tiles(const TileLists& lists, int64_t b, int64_t h, int64_t line, uint8_t* kinds) {
  const int32_t* list = lists.data + b * lists.batch + h * lists.head + line * lists.line;
  for (int64_t tile = 0; tile < lists.num_tiles; ++tile) kinds[tile] = kEmptyTile;
  for (int32_t n = 0; n < list[0]; ++n) kinds[list[2 + n]] = kFullTile;
  for (int32_t n = 0; n < list[1]; ++n) kinds[list[1 + lists.num_tiles - n]] = kMixedTile;
}

// Calls visit(first, last, mixed) for every run of tiles of one kind within [begin, end), skipping empty ones. Without tiles the whole
// range is one run. begin is a multiple of 64.
template <class Visit>
FA_INLINE void for_each_run(const uint8_t* kinds, int64_t begin, int64_t end, Visit&& visit) {
  if (!kinds) {
    if (begin < end) visit(begin, end, false);
    return;
  }
  while (begin < end) {
    const uint8_t kind = kinds[begin / 64];
    int64_t last = begin + 64;
    while (last < end && kinds[last / 64] == kind) last += 64;
    if (kind != kEmptyTile) visit(begin, min_of(last, end), kind == kMixedTile);
    begin = last;
  }
}

}  // namespace fused_attention::cpu::FA_ISA
