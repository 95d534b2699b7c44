// SPDX-License-Identifier: Apache-2.0
// out = x W^T + bias in float32 for a few rows of x, as a decoder takes with every token: reading W once is all the time there is.
//
// W is read where it lies. Its rows are as long as x's, so a register tile is dot products: kLinearRows rows of x with 4 rows of W, lanes
// along the depth, added up across lanes at the end. Rows of x come back to the same 8 rows of W, which a level-1 cache holds for
// kLinearDepth columns at a time; the first of them fetch the next ones from memory. A row of the result does not depend on how many rows
// there are.
#pragma once
#include "kernel_table.h"
#include "matmul.h"

namespace fused_attention::cpu::FA_ISA {

constexpr int kLinearRows = kVectorRegisters == 32 ? 6 : 3;  // 24 of 32 registers accumulate, or 12 of 16
constexpr int64_t kLinearColumns = 8;                        // rows of W that go through the cache together
constexpr int64_t kLinearDepth = 512;

// What a register tile fetches on the way: as many columns of `count` rows of W that come next.
struct Ahead {
  const float* row;
  int64_t row_stride;
  int count;
};

// sums[kRows][kLinearColumns] += x[kRows][depth] * w[4][depth]^T
template <int kRows>
FA_NOINLINE void add_dot_products(const float* x, int64_t x_row, const float* const w[4], const Ahead& ahead, int64_t depth, float* sums) {
  Vec products[kRows][4];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) products[i][n] = broadcast(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    const float* fetched = ahead.row + d;
    for (int n = 0; n < ahead.count; ++n, fetched += ahead.row_stride) __builtin_prefetch(fetched, 0, 2);
    Vec x_d[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) x_d[i] = load(x + i * x_row + d);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const Vec w_d = load(w[n] + d);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) products[i][n] = fmadd(x_d[i], w_d, products[i][n]);
    }
  }
  if (d < depth)
    for (int i = 0; i < kRows; ++i)
      for (int n = 0; n < 4; ++n)
        products[i][n] = fmadd(load_first(x + i * x_row + d, depth - d), load_first(w[n] + d, depth - d), products[i][n]);
  for (int i = 0; i < kRows; ++i) {
    float row[4];
    reduce_add4(products[i], row);
    for (int n = 0; n < 4; ++n) sums[i * kLinearColumns + n] += row[n];
  }
}

using AddDotProducts = void (*)(const float*, int64_t, const float* const[4], const Ahead&, int64_t, float*);
constexpr AddDotProducts kAddDotProducts[] = {
    // by how many rows of x
    nullptr,
    add_dot_products<1>,
    add_dot_products<2>,
    add_dot_products<3>,
    add_dot_products<(kLinearRows < 4 ? 3 : 4)>,
    add_dot_products<(kLinearRows < 5 ? 3 : 5)>,
    add_dot_products<(kLinearRows < 6 ? 3 : 6)>,
};

// Columns [first, last) of out.
[[maybe_unused]] static void run_linear(const Linear& linear, int64_t first, int64_t last) {
  float sums[Linear::kMaxRows * kLinearColumns];
  const int64_t row_blocks = (linear.rows + kLinearRows - 1) / kLinearRows, block_rows = (linear.rows + row_blocks - 1) / row_blocks;
  for (int64_t column = first; column < last; column += kLinearColumns) {
    const int64_t columns = min_of(kLinearColumns, last - column);
    for (int64_t i = 0; i < linear.rows; ++i)
      for (int64_t n = 0; n < columns; ++n) sums[i * kLinearColumns + n] = linear.bias ? linear.bias[column + n] : 0.0f;
    for (int64_t d = 0; d < linear.in_features; d += kLinearDepth) {
      const int64_t depth = min_of(kLinearDepth, linear.in_features - d);
      const float* w = linear.weight + column * linear.weight_row + d;
      const float* next = d + depth < linear.in_features ? w + depth : w + kLinearColumns * linear.weight_row - d;
      const int64_t num_tiles = row_blocks * ((columns + 3) / 4);
      int64_t tile = 0;
      for (int64_t i = 0; i < linear.rows; i += block_rows) {
        for (int64_t n = 0; n < columns; n += 4, ++tile) {
          const float* rows[4];  // past the last column the last one stands in
          for (int64_t m = 0; m < 4; ++m) rows[m] = w + min_of(n + m, columns - 1) * linear.weight_row;
          const int64_t fetch = kLinearColumns * tile / num_tiles, fetch_end = kLinearColumns * (tile + 1) / num_tiles;
          const Ahead ahead = {next + fetch * linear.weight_row, linear.weight_row, static_cast<int>(fetch_end - fetch)};
          kAddDotProducts[min_of(block_rows, linear.rows - i)](linear.x + i * linear.x_row + d, linear.x_row, rows, ahead, depth,
                                                               sums + i * kLinearColumns + n);
        }
      }
    }
    for (int64_t i = 0; i < linear.rows; ++i)
      for (int64_t n = 0; n < columns; ++n) linear.out[i * linear.out_features + column + n] = sums[i * kLinearColumns + n];
  }
}

}  // namespace fused_attention::cpu::FA_ISA
