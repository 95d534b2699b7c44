// SPDX-License-Identifier: Apache-2.0
// Products of bf16 tiles without AMX, by VDPBF16PS: each of its 16 lanes adds the products of a pair of A and a pair of B to a float32.
// NOTE: it rounds to nearest even and takes denormal numbers, read or computed, for 0, whatever MXCSR says.
#pragma once
#include "bf16_tiles.h"
#include "mask.h"

namespace fused_attention::cpu::FA_ISA {

#ifndef FA_MOST_PADDING  // tests compile with more
#define FA_MOST_PADDING 1.5
#endif

class DotProductTiles {
 public:
  static constexpr bool kAnySize = false;

  // Whether a problem, and the backward of one of its sequences, is left to tiles. Otherwise it is widened to float32, whose blocks need
  // less padding. NOTE: this must not depend on other sequences.
  static bool pay(const AttentionProblem& problem) { return head_dim_padding(problem) <= FA_MOST_PADDING; }
  static bool pay(const AttentionProblem& problem, const SequenceBounds& bounds) {
    if (bounds.seqlen_q <= kFewRows) return false;
    return padding(bounds.seqlen_q) * padding(bounds.seqlen_k) * head_dim_padding(problem) <= FA_MOST_PADDING;
  }

  // One block of C: kRowTiles x kColumnTiles tiles, each 1 or 2.
  template <int kRowTiles, int kColumnTiles, int kProducts>
  static FA_NOINLINE_MEMBER void matmul_block(int64_t depth, Parts a, int64_t a_stride, const TileGrid& b, int64_t column, float* c,
                                              int64_t c_stride, bool accumulate) {
    static_assert(kProducts == 1, "three products by VDPBF16PS take longer than one in float32");
    for (int64_t i = 0; i < 16 * kRowTiles; i += kRows)
      matmul_rows<kColumnTiles>(depth, a.high + i * a_stride, a_stride, b, column, c + i * c_stride, c_stride, accumulate);
  }

 private:
  static constexpr int kRows = 8;  // with two tiles of columns, 16 sums: enough to hide the latency at two instructions a cycle

  // How many times the multiply-adds are computed, because whole tiles are.
  static double padding(int64_t size) { return size > 0 ? static_cast<double>(round_up(size, 32)) / static_cast<double>(size) : 1.0; }
  static double head_dim_padding(const AttentionProblem& problem) { return padding(max_of(problem.head_dim_qk, problem.head_dim_v)); }

  template <int kColumnTiles>
  static FA_MEMBER_INLINE void matmul_rows(int64_t depth, const Bf16Bits* a, int64_t a_stride, const TileGrid& b, int64_t column, float* c,
                                           int64_t c_stride, bool accumulate) {
    __m512 sum[kRows][kColumnTiles];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumnTiles; ++j) sum[i][j] = accumulate ? _mm512_load_ps(c + i * c_stride + 16 * j) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 32) {
      const Bf16Bits* const tiles[2] = {b.at(column, k / 32, 0), b.at(column + kColumnTiles - 1, k / 32, 0)};
      for (int64_t pair = 0; pair < 32; pair += 2) {
        __m512bh b_pair[kColumnTiles];
#pragma GCC unroll 2
        for (int j = 0; j < kColumnTiles; ++j) b_pair[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(tiles[j] + 16 * pair));
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          int32_t bits;
          __builtin_memcpy(&bits, a + i * a_stride + k + pair, sizeof(bits));
          const __m512bh a_pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
#pragma GCC unroll 2
          for (int j = 0; j < kColumnTiles; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a_pair, b_pair[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumnTiles; ++j) _mm512_store_ps(c + i * c_stride + 16 * j, sum[i][j]);
  }
};

}  // namespace fused_attention::cpu::FA_ISA
