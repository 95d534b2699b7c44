// SPDX-License-Identifier: Apache-2.0
// Building blocks of the float32 kernels: a matrix product in register tiles, packing of strided rows of any storage type into float32
// blocks, a prefetcher and the scratch arena.
#pragma once
#include "simd.h"

namespace fused_attention::cpu::FA_ISA {

// Hands out 64-byte aligned pieces of one buffer. With a null base it only counts, so the same code plans the layout and runs it.
class Arena {
 public:
  explicit Arena(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

// Spreads software prefetches of strided rows - the next task's inputs, the current task's outputs - over the matrix products
// of the current task. Rows of a (B, L, H, D) tensor are short and far apart, so the hardware prefetcher does not follow them. Only
// a few lines are fetched at a time, because a core stalls when it has too many misses in flight.
class RowPrefetcher {
 public:
  void clear() { num_regions_ = current_ = offset_ = total_lines_ = lines_per_tick_ = 0; }
  void add_reads(const void* first_row, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
    add(first_row, stride_bytes, rows, row_bytes, false);
  }
  void add_writes(const void* first_row, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
    add(first_row, stride_bytes, rows, row_bytes, true);
  }
  void spread_over(int64_t ticks) { lines_per_tick_ = ticks > 0 ? (total_lines_ + ticks - 1) / ticks : 0; }

  FA_MEMBER_INLINE void tick() {
    for (int64_t n = lines_per_tick_; n > 0 && current_ < num_regions_; --n) {
      Region& region = regions_[current_];
      if (region.for_writing)
        __builtin_prefetch(region.row + offset_, 1, 2);
      else
        __builtin_prefetch(region.row + offset_, 0, 2);
      offset_ += 64;
      if (offset_ < region.row_bytes) continue;
      offset_ = 0;
      region.row += region.stride_bytes;
      if (--region.rows == 0) ++current_;
    }
  }

 private:
  struct Region {
    const char* row;
    int64_t stride_bytes, rows, row_bytes;
    bool for_writing;
  };

  void add(const void* first_row, int64_t stride_bytes, int64_t rows, int64_t row_bytes, bool for_writing) {
    if (rows <= 0 || num_regions_ == kMaxRegions) return;
    regions_[num_regions_++] = {static_cast<const char*>(first_row), stride_bytes, rows, row_bytes, for_writing};
    total_lines_ += rows * ((row_bytes + 63) / 64);
  }

  static constexpr int kMaxRegions = 9;
  Region regions_[kMaxRegions];
  int64_t num_regions_ = 0, current_ = 0;
  int64_t offset_ = 0;  // in bytes, within the row
  int64_t total_lines_ = 0, lines_per_tick_ = 0;
};

// A register tile is 6 x 4 vectors with 32 registers, of which 24 are accumulators, 6 x 2 with 16.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kVectorRegisters == 32 ? 4 : 2;
constexpr int64_t kTickSteps = 32;  // depth steps of a register tile between two prefetches

// The number of prefetch ticks in a product.
[[maybe_unused]] static int64_t matmul_ticks(int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kTileColumns = kTileVecs * kLanes;
  return (rows + kTileRows - 1) / kTileRows * ((columns + kTileColumns - 1) / kTileColumns) * ((depth + kTickSteps - 1) / kTickSteps);
}

// c[kRows][kVecs * kLanes] (+)= a[kRows][depth] * b[depth][kVecs * kLanes], where a[i][k] = a[i * a_row + k * a_col].
template <int kRows, int kVecs>
FA_INLINE void matmul_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                           int64_t c_row, bool accumulate, RowPrefetcher* prefetcher) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[i][j] = accumulate ? load(c + i * c_row + j * kLanes) : broadcast(0.0f);
  for (int64_t k = 0; k < depth;) {
    if (prefetcher) prefetcher->tick();
    for (const int64_t end = min_of(k + kTickSteps, depth); k < end; ++k) {
      Vec b_k[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) b_k[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec a_ik = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) sum[i][j] = fmadd(a_ik, b_k[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

template <int kVecs>
FA_NOINLINE void matmul_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                              float* c, int64_t c_row, bool accumulate, RowPrefetcher* prefetcher) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    matmul_tile<kTileRows, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
  }
  switch (rows) {
    case 5:
      return matmul_tile<5, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
    case 4:
      return matmul_tile<4, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
    case 3:
      return matmul_tile<3, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
    case 2:
      return matmul_tile<2, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
    case 1:
      return matmul_tile<1, kVecs>(depth, a, a_row, a_col, b, b_row, c, c_row, accumulate, prefetcher);
  }
}

// Depth steps at a time: the 32 KiB of b that every register tile of a panel reads then stay in L1.
constexpr int64_t kDepthBlock = 8192 / (kTileVecs * kLanes);

// c[rows][columns] (+)= a[rows][depth] * b[depth][columns]; columns must be a multiple of kLanes.
[[maybe_unused]] static void matmul(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                                    const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate,
                                    RowPrefetcher* prefetcher = nullptr) {
  for (int64_t j = 0; j < columns; j += kTileVecs * kLanes) {
    const int64_t vecs = min_of((columns - j) / kLanes, int64_t{kTileVecs});
    for (int64_t k = 0; k == 0 || k < depth; k += kDepthBlock) {
      const int64_t steps = min_of(depth - k, kDepthBlock);
      const float *a_k = a + k * a_col, *b_k = b + k * b_row + j;
      const bool add = accumulate || k > 0;
      if (vecs == kTileVecs)
        matmul_panel<kTileVecs>(rows, steps, a_k, a_row, a_col, b_k, b_row, c + j, c_row, add, prefetcher);
      else if (kTileVecs > 2 && vecs == 3)
        matmul_panel<kTileVecs == 4 ? 3 : 1>(rows, steps, a_k, a_row, a_col, b_k, b_row, c + j, c_row, add, prefetcher);
      else if (kTileVecs > 2 && vecs == 2)
        matmul_panel<kTileVecs == 4 ? 2 : 1>(rows, steps, a_k, a_row, a_col, b_k, b_row, c + j, c_row, add, prefetcher);
      else
        matmul_panel<1>(rows, steps, a_k, a_row, a_col, b_k, b_row, c + j, c_row, add, prefetcher);
    }
  }
}

// products[i][n] = a[i] . b[n] for kLines rows of a and four rows of b at a time, each loaded once, with independent sums.
template <int kLines, class T>
static void dot_products(const float* a, int64_t a_row, const T* const b[4], int64_t depth, float* products, int64_t products_row) {
  Vec sums[kLines][4];
#pragma GCC unroll 2
  for (int i = 0; i < kLines; ++i)
    for (int n = 0; n < 4; ++n) sums[i][n] = broadcast(0.0f);
  const auto add_step = [&](int64_t d, const Vec b_d[4]) FA_LAMBDA_INLINE {
#pragma GCC unroll 2
    for (int i = 0; i < kLines; ++i)
      for (int n = 0; n < 4; ++n) sums[i][n] = fmadd(load(a + i * a_row + d), b_d[n], sums[i][n]);
  };
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    const Vec b_d[4] = {load(b[0] + d), load(b[1] + d), load(b[2] + d), load(b[3] + d)};
    add_step(d, b_d);
  }
  if (d < depth) {
    const Vec b_d[4] = {load_first(b[0] + d, depth - d), load_first(b[1] + d, depth - d), load_first(b[2] + d, depth - d),
                        load_first(b[3] + d, depth - d)};
    add_step(d, b_d);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLines; ++i) reduce_add4(sums[i], products + i * products_row);
}

// Absent rows are packed as zeros, to keep garbage in them (even NaN) out of the products.
FA_INLINE bool is_absent(const float* key_bias, int64_t row) { return key_bias && key_bias[row] != 0.0f; }

// source: (rows, head_dim) with rows source_row apart -> packed: (rows, packed_row) float32, columns past head_dim zero.
// key_bias: (rows,), nonzero for absent rows; null if all are present.
template <class T>
static void pack_rows(const T* source, int64_t source_row, int64_t rows, int64_t head_dim, float* packed, int64_t packed_row,
                      const float* key_bias = nullptr) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = source + i * source_row;
    float* to = packed + i * packed_row;
    const int64_t present = is_absent(key_bias, i) ? 0 : head_dim;
    int64_t d = 0;
    for (; d + kLanes <= present; d += kLanes) store(to + d, load(from + d));
    if (d < present) store(to + d, load_first(from + d, present - d)), d += kLanes;
    for (; d < packed_row; d += kLanes) store(to + d, broadcast(0.0f));
  }
}

constexpr int64_t kKeyTile = 64;  // columns of a packed K^T tile

// source: (rows, head_dim) -> packed: (ceil(rows / kKeyTile), head_dim, kKeyTile) float32: tiles of the transpose. Columns past
// `rows` are zero up to the next multiple of 16 and unspecified beyond.
template <class T>
static void pack_transposed(const T* source, int64_t source_row, int64_t rows, int64_t head_dim, float* packed,
                            const float* key_bias = nullptr) {
  for (int64_t row0 = 0; row0 < rows; row0 += 16) {
    float* tile = packed + row0 / kKeyTile * kKeyTile * head_dim + row0 % kKeyTile;
    const int64_t present = min_of(rows - row0, int64_t{16});
    for (int64_t d0 = 0; d0 < head_dim; d0 += 16) {
      const T* from = source + row0 * source_row + d0;
      float* to = tile + d0 * kKeyTile;
      const int64_t columns = min_of(head_dim - d0, int64_t{16});
#if defined(FA_AVX512)
      __m512i r[16];
      if (present == 16 && columns == 16 && !key_bias) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(load(from + i * source_row).x);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          r[i] = i < present && !is_absent(key_bias, row0 + i) ? _mm512_castps_si512(load_first(from + i * source_row, columns).x)
                                                               : _mm512_setzero_si512();
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        if (j < columns) _mm512_storeu_si512(to + j * kKeyTile, r[j]);
#else
      for (int64_t i0 = 0; i0 < 16; i0 += kLanes) {
        for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
          Vec r[kLanes];
          for (int64_t i = i0; i < i0 + kLanes; ++i)
            r[i - i0] =
                i < present && !is_absent(key_bias, row0 + i) ? load_first(from + i * source_row + j0, columns - j0) : broadcast(0.0f);
          transpose(r);
          for (int64_t j = j0; j < min_of(j0 + kLanes, columns); ++j) store(to + j * kKeyTile + i0, r[j - j0]);
        }
      }
#endif
    }
  }
}

}  // namespace fused_attention::cpu::FA_ISA
