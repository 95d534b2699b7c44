// SPDX-License-Identifier: Apache-2.0
// Building blocks of the bf16 kernels: packing of rows into tiles, products of tiles, and vector functions. Needs AVX512-BF16.
//
// The product of a tile is C (16 x 16 fp32) += A (16 x 32 bf16) * B (32 x 16 bf16), by AMX (amx_tiles.h) or by dot products of pairs
// (dot_product_tiles.h), which read the same layouts. A is stored as is; B as 16 rows of 16 pairs: element (k, n) is in row k / 2, at
// position 2 * n + k % 2.
//
//   layout                      a tile holds                          made by                          used as
//   rows                        -                                     pack_rows                        A, depth = head dim
//   transposed rows             -                                     pack_transposed_rows             A, depth = sequence
//   pairs along the head dim    32 dims x 16 rows (the transpose)     pack_pairs_along_head_dim        B, depth = head dim
//   pairs along the sequence    32 rows x 16 dims                     pack_pairs_along_sequence        B, depth = sequence
#pragma once
#include "bf16_storage.h"
#include "dropout.h"
#include "matmul.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int64_t kTileElements = 512;  // bf16 values in one tile

FA_INLINE int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// Rows of one head in memory. Rows at or past num_rows, and rows whose presence bit is 0, read as zeros, which keeps garbage in them out of
// the products.
template <class Storage>
struct RowSource {
  using Element = typename Storage::Element;

  const Element* rows;  // (num_rows, head_dim)
  int64_t row_stride;   // in elements
  int64_t num_rows;
  int64_t head_dim;
  const uint16_t* present_bits;  // bit i % 16 of word i / 16 is 1 if row i is present; null: all are

  bool present(int64_t row) const { return row < num_rows && (!present_bits || (present_bits[row / 16] >> (row % 16) & 1)); }
  const Element* at(int64_t row, int64_t dim) const { return rows + row * row_stride + dim; }
  // A part of 32 elements from column `dim` on, 0 past head_dim.
  FA_MEMBER_INLINE __m512i load32(int64_t row, int64_t dim, int part) const {
    return present(row) ? Storage::load(at(row, dim), first_lanes32(head_dim - dim), part) : _mm512_setzero_si512();
  }
};

// Rows [row0, row0 + num_rows) of one head.
template <class Storage>
FA_INLINE RowSource<Storage> rows_of(const StridedTensor& tensor, int64_t b, int64_t h, int64_t row0, int64_t num_rows, int64_t head_dim,
                                     const uint16_t* present_bits = nullptr) {
  return {row_ptr<const typename Storage::Element>(tensor, b, h, row0), tensor.row, num_rows, head_dim, present_bits};
}

// packed (rows_padded, dim_padded)
template <class Storage>
void pack_rows(const RowSource<Storage>& source, int part, int64_t rows_padded, int64_t dim_padded, Bf16Bits* packed) {
  for (int64_t row = 0; row < rows_padded; ++row)
    for (int64_t dim = 0; dim < dim_padded; dim += 32) _mm512_store_si512(packed + row * dim_padded + dim, source.load32(row, dim, part));
}

// packed (rows_padded / 16, dim_padded / 32) tiles
template <class Storage>
void pack_pairs_along_head_dim(const RowSource<Storage>& source, int part, int64_t rows_padded, int64_t dim_padded, Bf16Bits* packed) {
  for (int64_t row = 0; row < rows_padded; row += 16)
    for (int64_t dim = 0; dim < dim_padded; dim += 32, packed += kTileElements) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = source.load32(row + i, dim, part);
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + i * 32, r[i]);
    }
}

// Interleaves two vectors of 32 values a, b into {a0, b0, a1, b1, ...}: lower and upper half.
struct Interleaver {
  __m512i lower, upper;
  Interleaver() {
    alignas(64) uint16_t index[64];
    for (int i = 0; i < 32; ++i) {
      index[2 * i] = static_cast<uint16_t>(i);
      index[2 * i + 1] = static_cast<uint16_t>(32 + i);
    }
    lower = _mm512_load_si512(index);
    upper = _mm512_load_si512(index + 32);
  }
};

// packed (rows_padded / 32, dim_padded / 16) tiles
template <class Storage>
void pack_pairs_along_sequence(const RowSource<Storage>& source, int part, int64_t rows_padded, int64_t dim_padded, Bf16Bits* packed) {
  const Interleaver interleave;
  for (int64_t row = 0; row < rows_padded; row += 2)
    for (int64_t dim = 0; dim < dim_padded; dim += 32) {
      const __m512i even = source.load32(row, dim, part), odd = source.load32(row + 1, dim, part);
      Bf16Bits* tile = packed + ((row / 32) * (dim_padded / 16) + dim / 16) * kTileElements + (row % 32 / 2) * 32;
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, interleave.lower, odd));
      _mm512_store_si512(tile + kTileElements, _mm512_permutex2var_epi16(even, interleave.upper, odd));
    }
}

// packed (dim_padded, stride) with stride >= rows_padded, a multiple of 32
template <class Storage>
void pack_transposed_rows(const RowSource<Storage>& source, int part, int64_t rows_padded, int64_t dim_padded, Bf16Bits* packed,
                          int64_t stride) {
  alignas(64) uint16_t index[64];
  for (int i = 0; i < 32; ++i) {
    index[i] = static_cast<uint16_t>(2 * i);
    index[32 + i] = static_cast<uint16_t>(2 * i + 1);
  }
  const __m512i even_dims = _mm512_load_si512(index), odd_dims = _mm512_load_si512(index + 32);
  for (int64_t row = 0; row < rows_padded; row += 32)
    for (int64_t dim = 0; dim < dim_padded; dim += 32) {
      __m512i low[16], high[16];  // dword i holds dims (dim + 2 r, dim + 2 r + 1) of row i
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) low[i] = source.load32(row + i, dim, part);
      transpose16(low);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) high[i] = source.load32(row + 16 + i, dim, part);
      transpose16(high);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        Bf16Bits* line = packed + (dim + 2 * i) * stride + row;
        _mm512_storeu_si512(line, _mm512_permutex2var_epi16(low[i], even_dims, high[i]));
        _mm512_storeu_si512(line + stride, _mm512_permutex2var_epi16(low[i], odd_dims, high[i]));
      }
    }
}

// The A operand of a matmul: rows of `stride` elements.
struct TileRows {
  Parts rows;
  int64_t stride;
};

// B tiles of a matmul: 16 columns by 32 of depth each; column and depth indices count tiles.
struct TileGrid {
  Parts tiles;
  int64_t column_step, depth_step;  // in tiles
  const Bf16Bits* at(int64_t column, int64_t depth, int part) const {
    return tiles.at(part) + (column * column_step + depth * depth_step) * kTileElements;
  }
};

// The parts of A and B that multiply each other where numbers have two; where they have one, only the first pair.
struct PartProduct {
  int of_a, of_b;
};
constexpr PartProduct kPartProducts[] = {{0, 0}, {0, 1}, {1, 0}};
template <class Storage>
constexpr int kNumPartProducts = Storage::kParts == 1 ? 1 : 3;

// NOTE: GCC's tile intrinsics do not tell the compiler which memory they read; this makes every earlier store visible to them.
FA_INLINE void publish_stores() { __asm__ volatile("" ::: "memory"); }

// C (rows, columns) fp32 (+)= A (rows, depth) * B (depth, columns); rows and columns are multiples of 16, depth of 32.
// Calls `tick` once per 32 x 32 block, to prefetch what comes next.
template <class Tiles, class Storage, class Tick>
FA_INLINE void tile_matmul(int64_t rows, int64_t columns, int64_t depth, const TileRows& a, const TileGrid& b, float* c, int64_t c_stride,
                           bool accumulate, Tick&& tick) {
  constexpr int kProducts = kNumPartProducts<Storage>;
  publish_stores();
  int64_t i = 0;
  for (; i + 32 <= rows; i += 32) {
    const Parts a_rows = a.rows + i * a.stride;
    int64_t j = 0;
    for (; j + 32 <= columns; j += 32) {
      tick();
      Tiles::template matmul_block<2, 2, kProducts>(depth, a_rows, a.stride, b, j / 16, c + i * c_stride + j, c_stride, accumulate);
    }
    if (j < columns)
      Tiles::template matmul_block<2, 1, kProducts>(depth, a_rows, a.stride, b, j / 16, c + i * c_stride + j, c_stride, accumulate);
  }
  if (i < rows) {
    const Parts a_rows = a.rows + i * a.stride;
    int64_t j = 0;
    for (; j + 32 <= columns; j += 32) {
      tick();
      Tiles::template matmul_block<1, 2, kProducts>(depth, a_rows, a.stride, b, j / 16, c + i * c_stride + j, c_stride, accumulate);
    }
    if (j < columns)
      Tiles::template matmul_block<1, 1, kProducts>(depth, a_rows, a.stride, b, j / 16, c + i * c_stride + j, c_stride, accumulate);
  }
}

// 2^x in `lanes`, 0 in the others and below 2^-126, NaN for NaN; `nonzero` receives the lanes that did not underflow. Degree 3 is enough
// if the result is rounded to bf16; lse needs 4. Masking VSCALEFPS avoids its slow underflow path.
template <int kDegree>
FA_INLINE __m512 exp2_masked(__m512 x, __mmask16 lanes, __mmask16* nonzero = nullptr) {
  const float* c = kExp2OfFraction[kDegree - 3];
  const __m512 fraction = _mm512_reduce_ps(x, 0x01 | 0x08);  // x - floor(x), no exceptions
  __m512 p = _mm512_set1_ps(c[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(c[i]));
  const __mmask16 keep = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
  if (nonzero) *nonzero = keep;
  return _mm512_maskz_scalef_ps(keep, p, x);
}

// Natural logarithm of positive normal numbers, relative to 1 within 2e-7: ln(m) = 2 artanh((m - 1) / (m + 1)), m in [2/3, 4/3).
FA_INLINE __m512 natural_log(__m512 x) {
  __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_ps(x);
  const __mmask16 high = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(4.0f / 3.0f), _CMP_GE_OQ);
  mantissa = _mm512_mask_mul_ps(mantissa, high, mantissa, _mm512_set1_ps(0.5f));
  exponent = _mm512_mask_add_ps(exponent, high, exponent, _mm512_set1_ps(1.0f));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(mantissa, one), _mm512_add_ps(mantissa, one)), t2 = _mm512_mul_ps(t, t);
  __m512 series = _mm512_set1_ps(2.0f / 9);
  series = _mm512_fmadd_ps(series, t2, _mm512_set1_ps(2.0f / 7));
  series = _mm512_fmadd_ps(series, t2, _mm512_set1_ps(2.0f / 5));
  series = _mm512_fmadd_ps(series, t2, _mm512_set1_ps(2.0f / 3));
  series = _mm512_fmadd_ps(series, t2, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(exponent, _mm512_set1_ps(kLn2), _mm512_mul_ps(series, t));
}

struct Max {
  static __attribute__((always_inline)) __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
struct Sum {
  static __attribute__((always_inline)) __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

// Lane i of the result is the sum (or the maximum) of the 16 lanes of v[i].
template <class Combine>
FA_INLINE __m512 reduce_16_vectors(const __m512* v, Combine) {
  __m512 pairs[8], quads[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = Combine::of(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = Combine::of(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // quads[i] lane 4 b + c: partial result of vector 4 i + c over 128-bit block b
  const __m512 low = Combine::of(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const __m512 high = Combine::of(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return Combine::of(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Sets bit i % 16 of word i / 16 of present_bits (seqlen_k rounded up to 32 bits) if key i is present. Returns true if some key is not.
static inline bool fill_present_bits(const AttentionProblem& problem, int64_t b, int64_t seqlen_k, uint16_t* present_bits) {
  const uint8_t* allowed = problem.key_mask + b * problem.key_mask_batch;
  bool holes = false;
  for (int64_t j0 = 0; j0 < round_up(seqlen_k, 32); j0 += 16) {
    uint32_t bits = 0;
    for (int64_t j = j0; j < min_of(j0 + 16, seqlen_k); ++j) {
      const bool present = allowed[j * problem.key_mask_key] != 0;
      bits |= static_cast<uint32_t>(present) << (j - j0);
      holes |= !present;
    }
    present_bits[j0 / 16] = static_cast<uint16_t>(bits);
  }
  return holes;
}

// dropout_keep_bits for transposed scores: sets bit i of keep[j * words_stride + w] if weight (row0 + 16 * w + i, key0 + j) is kept.
// row0, key0 and keys are multiples of 16, rows of 32; rows <= kMaxRows.
template <int64_t kMaxRows>
static void dropout_keep_bits_transposed(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0,
                                         int64_t keys, uint16_t* keep, int64_t words_stride) {
  alignas(64) uint16_t words[kMaxRows];
  for (int64_t j0 = 0; j0 < keys; j0 += 16) {
    dropout_keep_bits(problem, batch_head, row0, rows, key0 + j0, 1, words, 1);
    for (int64_t i = 0; i < rows; i += 32) {
      const __m512i of_rows = _mm512_load_si512(words + i);
      uint16_t* out = keep + j0 * words_stride + i / 16;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const uint32_t of_key = _mm512_test_epi16_mask(of_rows, _mm512_set1_epi16(static_cast<int16_t>(1u << j)));
        out[j * words_stride] = static_cast<uint16_t>(of_key);
        out[j * words_stride + 1] = static_cast<uint16_t>(of_key >> 16);
      }
    }
  }
}

}  // namespace fused_attention::cpu::FA_ISA
