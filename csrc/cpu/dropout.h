// SPDX-License-Identifier: Apache-2.0
// Which weights dropout keeps, as bits: 32 draws of the generator in philox.h cover 16 x 16 weights.
//
// A counter is (x, y, batch_head, offset), with x from the key and y from the row, so half of the work of the first rounds depends on
// only the key or only the row. With vectors of counters, those halves are computed once per 16 keys (PhiloxColumns) and once per
// 16 rows (PhiloxRows) instead of once per block:
//
//   round 1   multiplies x and batch_head;   round 2   the words of x and of y, separately;   round 3   one word of x, one of both
#pragma once
#include "../philox.h"
#include "../problem.h"
#include "simd.h"

namespace fused_attention::cpu::FA_ISA {

#if defined(FA_AVX512) || (FA_LANES == 8 && defined(__x86_64__))

// A vector of counter words, each in the low half of a 64-bit lane; the high halves hold garbage, which multiply() ignores.
#if defined(FA_AVX512)
using Words = __m512i;
constexpr int kCountersPerVector = 8;
FA_INLINE Words all_words(uint32_t value) { return _mm512_set1_epi64(value); }
FA_INLINE Words words_per_key() { return _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2); }
FA_INLINE Words words_per_row() { return _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3); }
FA_INLINE Words add(Words a, Words b) { return _mm512_add_epi64(a, b); }
FA_INLINE Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
FA_INLINE Words high_half(Words product) { return _mm512_shuffle_epi32(product, _MM_PERM_DDBB); }
FA_INLINE Words xor2(Words a, Words b) { return _mm512_xor_si512(a, b); }
FA_INLINE Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// Bit 16 * r + j: row r of 4, key j of 16, is kept. word[0] draws for keys 0-7 and word[1] for keys 8-15; `even` holds the counters
// with x = 0, 2 of each row and `odd` those with x = 1, 3, so interleaving them puts the numbers of 8 neighboring keys side by side.
FA_INLINE uint64_t kept(const Words even[2], const Words odd[2], uint16_t threshold) {
  uint64_t bits = 0;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i numbers = _mm512_mask_shuffle_epi32(even[half], 0xaaaa, odd[half], _MM_PERM_CCAA);
    bits |= _pdep_u64(_mm512_cmpge_epu16_mask(numbers, _mm512_set1_epi16(static_cast<int16_t>(threshold))),
                      0x00ff00ff00ff00ffull << (8 * half));
  }
  return bits;
}
#else
using Words = __m256i;
constexpr int kCountersPerVector = 4;
FA_INLINE Words all_words(uint32_t value) { return _mm256_set1_epi64x(value); }
FA_INLINE Words words_per_key() { return _mm256_setr_epi64x(0, 2, 0, 2); }
FA_INLINE Words words_per_row() { return _mm256_setr_epi64x(0, 0, 1, 1); }
FA_INLINE Words add(Words a, Words b) { return _mm256_add_epi64(a, b); }
FA_INLINE Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
FA_INLINE Words high_half(Words product) { return _mm256_shuffle_epi32(product, 0xf5); }
FA_INLINE Words xor2(Words a, Words b) { return _mm256_xor_si256(a, b); }
FA_INLINE Words xor3(Words a, Words b, Words c) { return xor2(xor2(a, b), c); }

// Bit 16 * r + j: row r of 2, key j of 16, is kept; see above.
FA_INLINE uint64_t kept(const Words even[2], const Words odd[2], uint16_t threshold) {
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  __m256i at_least[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i numbers = _mm256_blend_epi32(even[half], _mm256_slli_epi64(odd[half], 32), 0xaa);
    at_least[half] = _mm256_cmpeq_epi16(_mm256_max_epu16(numbers, limit), numbers);
  }
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(at_least[0], at_least[1])));
}
#endif

struct PhiloxColumns {
  Words low0, low1, round3_high, round3_low;
};
struct PhiloxRows {
  Words high, low;
};

static void draw_keep_bits(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0, int64_t words,
                           uint16_t* keep, int64_t words_stride) {
  constexpr int kRows = kCountersPerVector / 2, kGroups = 8 / kRows;  // rows per vector; vectors per 8 rows
  constexpr int64_t kRowBlocks = 8;                                   // blocks of 16 rows whose PhiloxRows are held at once
  const PhiloxKey seed = PhiloxKey::from_rng_state(problem.rng_state);
  const uint16_t threshold = static_cast<uint16_t>(problem.dropout_threshold);
  const Words multiplier0 = all_words(kPhiloxMultiplier0), multiplier1 = all_words(kPhiloxMultiplier1), offset = all_words(seed.offset);
  Words key_0[kPhiloxRounds], key_1[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    key_0[round] = all_words(seed.key0 + static_cast<uint32_t>(round) * kPhiloxWeyl0);
    key_1[round] = all_words(seed.key1 + static_cast<uint32_t>(round) * kPhiloxWeyl1);
  }
  const Words head = multiply(multiplier1, all_words(static_cast<uint32_t>(batch_head)));

  for (int64_t r0 = 0; r0 < rows; r0 += 16 * kRowBlocks) {
    const int64_t row_blocks = min_of((rows - r0 + 15) / 16, kRowBlocks);
    PhiloxRows row_share[kRowBlocks][kGroups];
    for (int64_t i = 0; i < row_blocks; ++i) {
      for (int group = 0; group < kGroups; ++group) {
        const Words y = add(all_words(static_cast<uint32_t>((row0 + r0) / 16 * 8 + i * 8 + group * kRows)), words_per_row());
        const Words product = multiply(multiplier0, xor3(high_half(head), y, key_0[0]));
        row_share[i][group] = {xor2(high_half(product), key_1[1]), product};
      }
    }
    for (int64_t w = 0; w < words; ++w) {
      PhiloxColumns columns[2];  // x = 0, 2 and x = 1, 3 of the 16 keys
      for (int odd = 0; odd < 2; ++odd) {
        const Words x = add(all_words(static_cast<uint32_t>((key0 / 16 + w) * 4 + odd)), words_per_key());
        const Words round1 = multiply(multiplier0, x);
        const Words round2 = multiply(multiplier1, xor3(high_half(round1), offset, key_1[0]));
        const Words round3 = multiply(multiplier0, xor3(high_half(round2), head, key_0[1]));
        columns[odd] = {round1, xor2(round2, key_0[2]), xor2(high_half(round3), key_1[2]), round3};
      }
      for (int64_t i = 0; i < row_blocks; ++i) {
        for (int group = 0; group < kGroups; ++group) {
          const PhiloxRows& row = row_share[i][group];
          Words drawn[4][2];  // word, parity of x
#pragma GCC unroll 2
          for (int odd = 0; odd < 2; ++odd) {
            const PhiloxColumns& column = columns[odd];
            const Words round3 = multiply(multiplier1, xor2(row.high, column.low0));
            Words word0 = xor2(high_half(round3), column.low1), word1 = round3, word2 = xor2(column.round3_high, row.low),
                  word3 = column.round3_low;
#pragma GCC unroll 4
            for (int round = 3; round < kPhiloxRounds; ++round) {
              const Words product0 = multiply(multiplier0, word0), product1 = multiply(multiplier1, word2);
              word0 = xor3(high_half(product1), word1, key_0[round]);
              word2 = xor3(high_half(product0), word3, key_1[round]);
              word1 = product1;
              word3 = product0;
            }
            drawn[0][odd] = word0, drawn[1][odd] = word1, drawn[2][odd] = word2, drawn[3][odd] = word3;
          }
          for (int upper = 0; upper < 2; ++upper) {  // rows 0-7 and 8-15 of the block
            const Words even[2] = {drawn[2 * upper][0], drawn[2 * upper + 1][0]}, odd[2] = {drawn[2 * upper][1], drawn[2 * upper + 1][1]};
            const uint64_t bits = kept(even, odd, threshold);
            uint16_t* out = keep + (r0 + i * 16 + upper * 8 + group * kRows) * words_stride + w;
            for (int r = 0; r < kRows; ++r) out[r * words_stride] = static_cast<uint16_t>(bits >> (16 * r));
          }
        }
      }
    }
  }
}

#else

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

// Sets bit j of keep[r * words_stride + w] if weight (row0 + r, key0 + 16 * w + j) is kept. row0 and key0 are multiples of 16; keep has
// room for `rows` rounded up to 16.
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
