// SPDX-License-Identifier: Apache-2.0
// What is added to the scores of one row, as a row of float32 in units of log2: attn_mask of any dtype and stride, ALiBi, and -inf
// wherever the row may not attend - masked or absent keys, bits of a PreparedMask, keys outside the diagonal's bounds. The kernels
// read that row instead of the masks, whatever they are. Included by mask.h.
#pragma once

namespace fused_attention::cpu::FA_ISA {

constexpr float kMaskedBelow = -1e30f * kLog2e;  // in units of log2: attn_mask values below -1e30 mask the entry, as -inf does

// The soft cap of scores, s -> softcap * tanh(s / softcap), from raw products Q K^T to units of log2.
struct Softcap {
  float inner, outer;  // x = outer * tanh(inner * product)
  explicit Softcap(const AttentionProblem& problem)
      : inner(problem.softcap != 0.0f ? problem.softmax_scale / problem.softcap : 0.0f), outer(problem.softcap * kLog2e) {}
  explicit operator bool() const { return outer != 0.0f; }
};

class ScoreBias {
 public:
  explicit ScoreBias(const AttentionProblem& problem) : problem_(problem) {}

  // key_bias: of fill_key_bias, null when all keys below seqlen_k are present.
  void enter(const SequenceBounds& bounds, int64_t b, int64_t h, const float* key_bias) {
    bounds_ = &bounds, b_ = b, h_ = h, key_bias_ = key_bias;
    slope_ = problem_.alibi_slopes ? problem_.alibi_slopes[b * problem_.alibi_slopes_batch + h * problem_.alibi_slopes_head] : 0.0f;
  }

  // Whether more than `visible_keys` is needed to compute scores from products; `mixed` tiles of a PreparedMask need their bits.
  bool needed(bool mixed) const { return key_bias_ || needed_beyond_absent_keys(mixed); }
  bool needed_beyond_absent_keys(bool mixed) const {
    return problem_.attn_mask.data || problem_.alibi_slopes || problem_.window_left < kUnlimited || mixed;
  }
  bool same_for_all_rows(bool mixed) const {
    return !(mixed || problem_.alibi_slopes || has_diagonal(problem_) || (problem_.attn_mask.data && problem_.attn_mask.row != 0));
  }

  // A float32 attn_mask that is all there is to add lies in memory ready to be read: its row from key0 on, in natural units; else null.
  const float* plain_mask_row(int64_t row, int64_t key0, bool mixed) const {
    const bool plain = problem_.attn_mask.data && problem_.attn_mask_dtype == MaskDtype::float32 && problem_.attn_mask_key == 1 &&
                       !key_bias_ && !problem_.alibi_slopes && problem_.window_left >= kUnlimited && !mixed;
    return plain ? mask_row<float>(row, key0) : nullptr;
  }

  // kLanes values of such a row, of which `remaining` exist, in units of log2. Fetches those of a later row: rows lie too far from each
  // other for the hardware prefetcher.
  FA_MEMBER_INLINE Vec mask_values(const float* mask, int64_t remaining, int64_t rows_ahead) const {
    __builtin_prefetch(mask + rows_ahead * problem_.attn_mask.row);
    return mul(remaining >= kLanes ? load(mask) : load_first(mask, max_of(remaining, int64_t{0})), broadcast(kLog2e));
  }

  // bias[0, keys) of the keys from key0 on, and -inf up to the next multiple of 16.
  FA_NOINLINE_MEMBER void fill(int64_t row, int64_t key0, int64_t keys, bool mixed, float* bias) const {
    const int64_t padded = round_up(keys, 16);
    if (problem_.attn_mask.data) {
      fill_mask(row, key0, keys, bias);
    } else {
      for (int64_t j = 0; j < padded; j += kLanes) store(bias + j, broadcast(0.0f));
    }
    if (key_bias_)
      for (int64_t j = 0; j < padded; j += kLanes) store(bias + j, add(load(bias + j), load(key_bias_ + key0 + j)));
    if (problem_.alibi_slopes) {
      const Vec slope = broadcast(-slope_ * kLog2e);
      for (int64_t j = 0; j < padded; j += kLanes) store(bias + j, fmadd(distances(row, key0 + j), slope, load(bias + j)));
    }
    if (mixed) apply_bits(row, key0, keys, bias);
    const int64_t first = first_visible_key(*bounds_, row) - key0, last = min_of(visible_keys(*bounds_, row) - key0, keys);
    for (int64_t j = 0; j < min_of(first, padded); j += kLanes)
      store(bias + j, select(first_lanes(first - j), broadcast(-kInfinity), load(bias + j)));
    for (int64_t j = max_of(last, int64_t{0}) / kLanes * kLanes; j < padded; j += kLanes)
      store(bias + j, select(first_lanes(last - j), load(bias + j), broadcast(-kInfinity)));
  }

  // |j - i - diagonal| of row i and the keys from j on.
  FA_MEMBER_INLINE Vec distances(int64_t row, int64_t key) const {
    return absolute(add(broadcast(static_cast<float>(key - row - bounds_->diagonal)), lane_indices()));
  }

 private:
  void fill_mask(int64_t row, int64_t key0, int64_t keys, float* bias) const {
    switch (problem_.attn_mask_dtype) {
      case MaskDtype::float32:
        return fill_float_mask<float>(row, key0, keys, bias);
      case MaskDtype::bfloat16:
        return fill_float_mask<bfloat16_t>(row, key0, keys, bias);
      case MaskDtype::float16:
        return fill_float_mask<float16_t>(row, key0, keys, bias);
      case MaskDtype::boolean:
        return fill_bool_mask(row, key0, keys, bias);
    }
  }

  template <class T>
  const T* mask_row(int64_t row, int64_t key0) const {
    return row_ptr<const T>(problem_.attn_mask, b_, h_, row) + key0 * problem_.attn_mask_key;
  }

  template <class T>
  void fill_float_mask(int64_t row, int64_t key0, int64_t keys, float* bias) const {
    const T* mask = mask_row<T>(row, key0);
    const int64_t stride = problem_.attn_mask_key;
    T gathered[kLanes];
    for (int64_t j = 0; j < round_up(keys, 16); j += kLanes) {
      const int64_t remaining = keys - j;
      const T* from = mask + j;
      __builtin_prefetch(from + problem_.attn_mask.row);
      if (stride != 1) {
        for (int64_t n = 0; n < min_of(remaining, int64_t{kLanes}); ++n) gathered[n] = mask[(j + n) * stride];
        from = gathered;
      }
      const Vec value = remaining >= kLanes ? load(from) : remaining > 0 ? load_first(from, remaining) : broadcast(0.0f);
      store(bias + j, mul(value, broadcast(kLog2e)));
    }
  }

  void fill_bool_mask(int64_t row, int64_t key0, int64_t keys, float* bias) const {
    const uint8_t* mask = mask_row<uint8_t>(row, key0);
    const int64_t stride = problem_.attn_mask_key;
    for (int64_t j = 0; j < round_up(keys, 16); j += 16) {
      const int64_t count = min_of(keys - j, int64_t{16});
      __builtin_prefetch(mask + j * stride + problem_.attn_mask.row);
      const uint16_t bits = stride == 1 && count == 16 ? nonzero_bytes(mask + j) : nonzero_bytes(mask + j * stride, stride, count);
      for (int lane0 = 0; lane0 < 16; lane0 += kLanes)
        store(bias + j + lane0, select(lanes_of_bits(bits, lane0), broadcast(0.0f), broadcast(-kInfinity)));
    }
  }

  static uint16_t nonzero_bytes(const uint8_t* bytes, int64_t stride, int64_t count) {
    uint32_t bits = 0;
    for (int64_t n = 0; n < count; ++n) bits |= static_cast<uint32_t>(bytes[n * stride] != 0) << n;
    return static_cast<uint16_t>(bits);
  }
  static uint16_t nonzero_bytes(const uint8_t* bytes) {  // 16 of them; eight at a time, as multiples of 2^7 that a product gathers
    uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      uint64_t word;
      __builtin_memcpy(&word, bytes + 8 * half, 8);
      bits |= static_cast<uint32_t>((word & 0x0101010101010101ull) * 0x0102040810204080ull >> 56) << (8 * half);
    }
    return static_cast<uint16_t>(bits);
  }

  // key0 is a multiple of 16.
  void apply_bits(int64_t row, int64_t key0, int64_t keys, float* bias) const {
    const BitMask& mask = problem_.mask_bits;
    const uint32_t* words = mask.data + b_ * mask.batch + h_ * mask.head + row * mask.line;
    for (int64_t j = 0; j < keys; j += 16) {
      const uint16_t bits = static_cast<uint16_t>(words[(key0 + j) / 32] >> ((key0 + j) % 32));
      for (int lane0 = 0; lane0 < 16; lane0 += kLanes)
        store(bias + j + lane0, select(lanes_of_bits(bits, lane0), load(bias + j + lane0), broadcast(-kInfinity)));
    }
  }

  const AttentionProblem& problem_;
  const SequenceBounds* bounds_ = nullptr;
  int64_t b_ = 0, h_ = 0;
  const float* key_bias_ = nullptr;
  float slope_ = 0.0f;
};

// kLanes scores in units of log2 from products, -inf where the bias is; tanh: what the soft cap's slope is computed from.
FA_INLINE Vec biased_scores(Vec product, float log2_scale, const Softcap& softcap, Vec bias, Vec* tanh_of_score = nullptr) {
  Vec x;
  if (softcap) {
    const Vec t = tanh(mul(product, broadcast(softcap.inner)));
    if (tanh_of_score) *tanh_of_score = t;
    x = fmadd(t, broadcast(softcap.outer), bias);
  } else {
    x = fmadd(product, broadcast(log2_scale), bias);
  }
  return select(less_than(bias, broadcast(kMaskedBelow)), broadcast(-kInfinity), x);
}

// The kinds of a PreparedMask's tiles of 64 keys for one block of 64 rows, from its lists.
enum TileKind : uint8_t { kEmptyTile = 0, kFullTile = 1, kMixedTile = 2 };

static inline void expand_tiles(const TileLists& lists, int64_t b, int64_t h, int64_t line, uint8_t* kinds) {
  const int32_t* list = lists.data + b * lists.batch + h * lists.head + line * lists.line;
  for (int64_t tile = 0; tile < lists.num_tiles; ++tile) kinds[tile] = kEmptyTile;
  for (int32_t n = 0; n < list[0]; ++n) kinds[list[2 + n]] = kFullTile;
  for (int32_t n = 0; n < list[1]; ++n) kinds[list[1 + lists.num_tiles - n]] = kMixedTile;
}

// Calls visit(first, last, mixed) for every run of tiles of one kind within [begin, end), skipping empty ones. Without tiles there is
// one run. begin is a multiple of 64.
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
