// SPDX-License-Identifier: Apache-2.0
// Which keys a query row sees, and which weights dropout keeps. Included after simd.h.
#pragma once

namespace fused_attention::cpu::FA_ISA {

// The part of one sequence that is present: rows [0, seqlen_q), keys [0, seqlen_k). Under a causal mask row i sees keys j <= i + diagonal.
struct SequenceBounds {
  int64_t seqlen_q, seqlen_k, diagonal;
};

static inline SequenceBounds sequence_bounds(const AttentionProblem& problem, int64_t b) {
  const int64_t seqlen_q = problem.query_lengths ? min_of(max_of(int64_t{problem.query_lengths[b]}, int64_t{0}), problem.seqlen_q) : problem.seqlen_q;
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

#if defined(FA_AVX512)

// Eight Philox counters in the low halves of eight 64-bit lanes; the high halves hold garbage, which _mm512_mul_epu32 ignores.
FA_INLINE __m512i high_half(__m512i product) { return _mm512_shuffle_epi32(product, _MM_PERM_DDBB); }
FA_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// What the first three rounds compute from the key block alone, for 8 counters.
struct PhiloxColumns { __m512i low0, low1, round3_high, round3_low; };
// What the first two rounds compute from the row alone.
struct PhiloxRows { __m512i high, low; };

// Bits of 4 rows x 16 keys: bit 16 * r + j. word_lo holds keys 0-7, word_hi keys 8-15; `even` holds counters x = 0, 2 of each
// row and `odd` those with x = 1, 3, so that interleaving them puts a row's 8 keys side by side.
FA_INLINE uint64_t keep_bits_of_words(const __m512i even[2], const __m512i odd[2], __m512i threshold) {
  uint64_t bits = 0;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i numbers = _mm512_mask_shuffle_epi32(even[half], 0xaaaa, odd[half], _MM_PERM_CCAA);
    bits |= _pdep_u64(_mm512_cmpge_epu16_mask(numbers, threshold), 0x00ff00ff00ff00ffull << (8 * half));
  }
  return bits;
}

// Bit j of keep[r * words_stride + w] = weight (row0 + r, key0 + 16 * w + j) is kept. row0 and key0 are multiples of 16; keep
// holds rows rounded up to 16.
// The counter is (x from the key, y from the row, batch_head, offset), so half of each of the first rounds depends on only one
// of key and row: those halves are computed once per 16 keys or once per 16 rows instead of once per block.
static void draw_keep_bits(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0, int64_t words,
                           uint16_t* keep, int64_t words_stride) {
  const PhiloxKey seed = PhiloxKey::from_rng_state(problem.rng_state);
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0), multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(problem.dropout_threshold));
  __m512i key_0[kPhiloxRounds], key_1[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    key_0[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed.key0 + round * kPhiloxWeyl0));
    key_1[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed.key1 + round * kPhiloxWeyl1));
  }
  const uint64_t head_product = static_cast<uint64_t>(kPhiloxMultiplier1) * static_cast<uint32_t>(batch_head);
  const __m512i head_high = _mm512_set1_epi64(static_cast<int64_t>(head_product >> 32));
  const __m512i head_low = _mm512_set1_epi64(static_cast<int64_t>(head_product & 0xffffffffu));
  const __m512i offset = _mm512_set1_epi64(seed.offset);
  const __m512i x_of_lane = _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2), y_of_lane = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);

  constexpr int64_t kRowBlocks = 8;  // rows of 16 whose share is kept in registers and L1 at a time
  for (int64_t r0 = 0; r0 < rows; r0 += 16 * kRowBlocks) {
    const int64_t row_blocks = min_of((rows - r0 + 15) / 16, kRowBlocks);
    PhiloxRows row_share[kRowBlocks][2];
    for (int64_t i = 0; i < row_blocks; ++i) {
      for (int quad = 0; quad < 2; ++quad) {
        const __m512i y = _mm512_add_epi64(_mm512_set1_epi64((row0 + r0) / 16 * 8 + i * 8 + quad * 4), y_of_lane);
        const __m512i product = _mm512_mul_epu32(multiplier0, xor3(head_high, y, key_0[0]));
        row_share[i][quad] = {_mm512_xor_si512(high_half(product), key_1[1]), product};
      }
    }
    for (int64_t w = 0; w < words; ++w) {
      PhiloxColumns columns[2];
      for (int parity = 0; parity < 2; ++parity) {
        const __m512i x = _mm512_add_epi64(_mm512_set1_epi64((key0 / 16 + w) * 4 + parity), x_of_lane);
        const __m512i product0 = _mm512_mul_epu32(multiplier0, x);
        const __m512i product1 = _mm512_mul_epu32(multiplier1, xor3(high_half(product0), offset, key_1[0]));
        const __m512i round3 = _mm512_mul_epu32(multiplier0, xor3(high_half(product1), head_low, key_0[1]));
        columns[parity] = {product0, _mm512_xor_si512(product1, key_0[2]), _mm512_xor_si512(high_half(round3), key_1[2]), round3};
      }
      for (int64_t i = 0; i < row_blocks; ++i) {
        for (int quad = 0; quad < 2; ++quad) {
          __m512i word[4][2];  // word, parity of x
#pragma GCC unroll 2
          for (int parity = 0; parity < 2; ++parity) {
            const PhiloxColumns& column = columns[parity];
            const PhiloxRows& row = row_share[i][quad];
            const __m512i product1 = _mm512_mul_epu32(multiplier1, _mm512_xor_si512(row.high, column.low0));
            __m512i w0 = _mm512_xor_si512(high_half(product1), column.low1), w1 = product1;
            __m512i w2 = _mm512_xor_si512(column.round3_high, row.low), w3 = column.round3_low;
#pragma GCC unroll 4
            for (int round = 3; round < kPhiloxRounds; ++round) {
              const __m512i next1 = _mm512_mul_epu32(multiplier1, w2), next3 = _mm512_mul_epu32(multiplier0, w0);
              w0 = xor3(high_half(next1), w1, key_0[round]);
              w2 = xor3(high_half(next3), w3, key_1[round]);
              w1 = next1;
              w3 = next3;
            }
            word[0][parity] = w0, word[1][parity] = w1, word[2][parity] = w2, word[3][parity] = w3;
          }
          for (int upper = 0; upper < 2; ++upper) {  // rows 0-7, rows 8-15 of the block
            const __m512i even[2] = {word[2 * upper][0], word[2 * upper + 1][0]}, odd[2] = {word[2 * upper][1], word[2 * upper + 1][1]};
            const uint64_t bits = keep_bits_of_words(even, odd, threshold);
            uint16_t* out = keep + (r0 + i * 16 + upper * 8 + quad * 4) * words_stride + w;
            for (int r = 0; r < 4; ++r) out[r * words_stride] = static_cast<uint16_t>(bits >> (16 * r));
          }
        }
      }
    }
  }
}

#else

// Bit j of keep[r * words_stride + w] = weight (row0 + r, key0 + 16 * w + j) is kept. row0 and key0 are multiples of 16; keep
// holds rows rounded up to 16. Loops over the 32 counters of a 16 x 16 block, which the compiler turns into vectors.
static void draw_keep_bits(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0, int64_t words,
                           uint16_t* keep, int64_t words_stride) {
  constexpr int kCounters = 32;  // counter n belongs to row n / 4 and keys 2 * (n % 4) + {0, 1}
  const PhiloxKey seed = PhiloxKey::from_rng_state(problem.rng_state);
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    for (int64_t w = 0; w < words; ++w) {
      uint32_t word[4][kCounters];
      for (int n = 0; n < kCounters; ++n) {
        word[0][n] = static_cast<uint32_t>((key0 / 16 + w) * 4 + n % 4);
        word[1][n] = static_cast<uint32_t>((row0 + r0) / 16 * 8 + n / 4);
        word[2][n] = static_cast<uint32_t>(batch_head);
        word[3][n] = seed.offset;
      }
      uint32_t key_0 = seed.key0, key_1 = seed.key1;
      for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int n = 0; n < kCounters; ++n) {
          const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * word[0][n];
          const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * word[2][n];
          word[0][n] = static_cast<uint32_t>(product1 >> 32) ^ word[1][n] ^ key_0;
          word[2][n] = static_cast<uint32_t>(product0 >> 32) ^ word[3][n] ^ key_1;
          word[1][n] = static_cast<uint32_t>(product1);
          word[3][n] = static_cast<uint32_t>(product0);
        }
        key_0 += kPhiloxWeyl0;
        key_1 += kPhiloxWeyl1;
      }
      for (int r = 0; r < 16; ++r) {
        uint32_t bits = 0;
        for (int j = 0; j < 16; ++j) {
          const uint32_t drawn = word[r / 8 * 2 + j / 8][r % 8 * 4 + j % 8 / 2];
          bits |= static_cast<uint32_t>((drawn >> (j % 2 * 16) & 0xffff) >= problem.dropout_threshold) << j;
        }
        keep[(r0 + r) * words_stride + w] = static_cast<uint16_t>(bits);
      }
    }
  }
}

#endif

static void dropout_keep_bits(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0, int64_t words,
                              uint16_t* keep, int64_t words_stride) {
  if (problem.dropout_threshold > 0 && problem.dropout_threshold < 65536) {
    draw_keep_bits(problem, batch_head, row0, rows, key0, words, keep, words_stride);
    return;
  }
  const uint16_t all = problem.dropout_threshold == 0 ? 0xffff : 0;  // nothing to draw
  for (int64_t r = 0; r < round_up(rows, 16); ++r)
    for (int64_t w = 0; w < words; ++w) keep[r * words_stride + w] = all;
}

}  // namespace fused_attention::cpu::FA_ISA
