// SPDX-License-Identifier: Apache-2.0
// Tiles of 16-bit elements in shared memory, and warp-level matrix products on them.
//
// A row is stored in chunks of 16 bytes, swizzled: chunk c of row r goes to slot c ^ (r % 8) of eight, or to slot c ^ (r / 2 % 4) of four
// if a row is not a multiple of 128 bytes. The same chunk of eight consecutive rows, which is what one 8 x 8 matrix of ldmatrix reads, is
// then in eight different groups of four banks, and so are eight chunks of one row, which is what eight lanes copy (docs/cuda-kernels.md).
#pragma once
#include "shared_memory.cuh"

namespace fused_attention::cuda {

constexpr int kChunk = 8;  // elements in 16 bytes

template <class Tile>
struct LaneAddress;

template <int ROWS, int COLUMNS>
struct alignas(128) SharedTile {
  static_assert(COLUMNS % 32 == 0, "rows of whole 64-byte pieces");
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kPitch = 2 * COLUMNS, kBytes = ROWS * kPitch;
  static constexpr int kPermuted = COLUMNS % 64 == 0 ? 8 : 4;  // chunks that are permuted among themselves

  unsigned char bytes[kBytes];

  static FA_DEVICE int swizzle(int row) { return kPermuted == 8 ? row % 8 : row / 2 % 4; }
  static FA_DEVICE uint32_t offset_in_row(int row, int chunk) { return (chunk ^ swizzle(row)) << 4; }
  static FA_DEVICE uint32_t offset(int row, int chunk) { return row * kPitch + offset_in_row(row, chunk); }

  // The addresses that the lanes of a warp give to ldmatrix for a 16 x 16 piece. An mma wants its operands in consecutive registers, which
  // decides the order of the four 8 x 8 matrices:
  //
  //   by_rows      upper left, lower left, upper right, lower right: the a operand; with trans b0 and b1 of columns 0 to 7, then of 8 to 15
  //   by_columns   upper left, upper right, lower left, lower right: b0 and b1 of the piece transposed, of rows 0 to 7, then of 8 to 15
  //
  // first_sixteen: 16 * first_sixteen columns to the right; the `sixteens` of at() must have no bit in common with it.
  FA_DEVICE LaneAddress<SharedTile> by_rows(int first_row = 0, int first_sixteen = 0, uint32_t thread = threadIdx.x) const {
    const int lane = thread % 32;
    return {ptx::shared_address(this) + offset(first_row + lane % 16, 2 * first_sixteen + lane / 16)};
  }
  FA_DEVICE LaneAddress<SharedTile> by_columns(int first_sixteen = 0, uint32_t thread = threadIdx.x) const {
    const int lane = thread % 32;
    return {ptx::shared_address(this) + offset(lane / 16 * 8 + lane % 8, 2 * first_sixteen + lane / 8 % 2)};
  }
};

// Where a lane reads in a tile. Loop offsets are compile-time constants: only the swizzled chunk takes an instruction.
template <class Tile>
struct LaneAddress {
  uint32_t first;  // of the lane's chunk in the first two columns of chunks; bits 4 to 6 are its swizzled slot

  // `rows` down, a multiple of 8, and 16 * `sixteens` columns to the right. Tiles are aligned to 128 bytes.
  FA_DEVICE uint32_t at(int rows, int sixteens) const {
    constexpr int kPeriod = Tile::kPermuted / 2;
    return (first ^ (sixteens % kPeriod * 32)) + (rows * Tile::kPitch + sixteens / kPeriod * (kPeriod * 32));
  }
  // The same place in another tile of an array.
  FA_DEVICE LaneAddress operator[](int tile) const { return {first + tile * Tile::kBytes}; }
  // As the left operand of multiply_transposed.
  FA_DEVICE void operator()(int step, int matrix, uint32_t (&a)[4]) const { ptx::ldmatrix_x4(a, at(16 * matrix, step)); }
};

// Copies rows of a tensor into a tile, asynchronously. Rows that do not exist and columns past `columns` become 0.
//   source: row 0 of the tile; exists(row): whether that row of the tile exists
template <int NUM_THREADS, class Tile, class Exists>
FA_DEVICE void copy_rows_async(Tile& tile, const uint16_t* source, int64_t stride, int columns, uint32_t thread, Exists exists) {
  constexpr int kLanes = Tile::kPermuted, kRowsAtOnce = NUM_THREADS / kLanes;  // lanes that copy a row together
  static_assert(Tile::kRows % kRowsAtOnce == 0, "every pass copies whole rows");
  const int row = static_cast<int>(thread / kLanes), chunk = static_cast<int>(thread % kLanes);
  const uint32_t first = ptx::shared_address(&tile);
  source += row * stride + chunk * kChunk;
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsAtOnce; ++pass) {
    const bool row_exists = exists(row + pass * kRowsAtOnce);
    // The compiler does not see that the swizzle repeats every eight rows.
    const uint32_t target = first + (kRowsAtOnce % 8 == 0 ? Tile::offset(row, chunk) + pass * kRowsAtOnce * Tile::kPitch
                                                          : Tile::offset(row + pass * kRowsAtOnce, chunk));
#pragma unroll
    for (int i = 0; i < Tile::kColumns / (kLanes * kChunk); ++i) {
      const int column = i * kLanes * kChunk;
      ptx::cp_async_16(target + 2 * column, source + column, row_exists && chunk * kChunk + column < columns);
    }
    source += kRowsAtOnce * stride;
  }
}

// Accumulators of a warp: MATRICES times 16 rows, BLOCKS times 8 columns. Lane i holds of each 16 x 8 block the elements (i / 4, 2 (i %
// 4)), the one to its right, and both of these 8 rows below.
template <int MATRICES, int BLOCKS>
using Accumulators = float[MATRICES][BLOCKS][4];

// act(m, n, e) for each element of a lane.
template <int MATRICES, int BLOCKS, class Act>
FA_DEVICE void for_each_of_lane(Act act) {
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) act(m, n, e);
    }
  }
}

// act(element, row, column), both relative to the accumulators.
template <int MATRICES, int BLOCKS, class Act>
FA_DEVICE void for_each_element(Accumulators<MATRICES, BLOCKS>& accumulators, Act act) {
  const int lane = threadIdx.x % 32;
  for_each_of_lane<MATRICES, BLOCKS>(
      [&](int m, int n, int e) { act(accumulators[m][n][e], 16 * m + e / 2 * 8 + lane / 4, 8 * n + 2 * (lane % 4) + e % 2); });
}

// Stores a warp's 16 rows times `factor`, up to num_rows rows and `columns` columns of the tile, through the warp's rows of a tile in
// shared memory that is no longer read. target: row 0 of the tile.
template <Dtype DTYPE, class Tile, int BLOCKS>
FA_DEVICE void store_rows(const Accumulators<1, BLOCKS>& accumulators, float factor, Tile& tile, int first_row, int num_rows,
                          uint16_t* target, int64_t stride, int columns) {
  static_assert(8 * BLOCKS == Tile::kColumns);
  constexpr int kLanes = Tile::kPermuted;  // that store a row together
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    unsigned char* const row_smem = tile.bytes + row * Tile::kPitch + 4 * (lane % 4);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
      *reinterpret_cast<uint32_t*>(row_smem + Tile::offset_in_row(row, n)) =
          ptx::pack<DTYPE>(accumulators[0][n][2 * half] * factor, accumulators[0][n][2 * half + 1] * factor);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kLanes / 32; ++i) {
    const int row = first_row + i * (32 / kLanes) + lane / kLanes;
#pragma unroll
    for (int j = 0; j < BLOCKS / kLanes; ++j) {
      const int chunk = lane % kLanes + j * kLanes;
      if (row < num_rows && chunk * kChunk < columns) {
        *reinterpret_cast<uint4*>(target + row * stride + chunk * kChunk) =
            *reinterpret_cast<const uint4*>(tile.bytes + Tile::offset(row, chunk));
      }
    }
  }
}

// Two 16 x 8 blocks of accumulators, n and the next, += a (16 x 16) times b (16 x 16), or = it in the first of several steps.
template <Dtype DTYPE, int BLOCKS>
FA_DEVICE void multiply_step(float (&sums)[BLOCKS][4], int n, const uint32_t (&a)[4], const uint32_t (&b)[4], bool is_first = false) {
  using Block = const float (&)[4];
  const float zero[4] = {};  // the zero register: no accumulators to clear
  Block left = is_first ? zero : static_cast<Block>(sums[n]), right = is_first ? zero : static_cast<Block>(sums[n + 1]);
  ptx::mma_m16n8k16<DTYPE>(sums[n], a, b[0], b[1], left);
  ptx::mma_m16n8k16<DTYPE>(sums[n + 1], a, b[2], b[3], right);
}

// scores = left (16 * MATRICES x HEAD_DIM) times the transpose of keys (8 * BLOCKS x HEAD_DIM)
//   left(step, matrix, a): loads the a operand of that piece
template <Dtype DTYPE, int MATRICES, int BLOCKS, class KeyTile, class Left>
FA_DEVICE void multiply_transposed(Accumulators<MATRICES, BLOCKS>& scores, Left left, const LaneAddress<KeyTile>& keys) {
#pragma unroll
  for (int step = 0; step < KeyTile::kColumns / 16; ++step) {
    uint32_t a[MATRICES][4];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) left(step, m, a[m]);
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, keys.at(8 * n, step));
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) multiply_step<DTYPE>(scores[m], n, a[m], b, step == 0);
    }
  }
}

// A warp's weights (16 x 8 * BLOCKS) in 16 bits: for block n, the two of row lane / 4, then the two of the row 8 below.
template <int BLOCKS>
using PackedWeights = uint32_t[BLOCKS][2];

template <Dtype DTYPE, int BLOCKS>
FA_DEVICE void pack_weights(PackedWeights<BLOCKS>& packed, const Accumulators<1, BLOCKS>& weights) {
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) packed[n][half] = ptx::pack<DTYPE>(weights[0][n][2 * half], weights[0][n][2 * half + 1]);
  }
}

// Stores them in a tile, starting at first_row.
template <class Tile, int BLOCKS>
FA_DEVICE void store_packed(const PackedWeights<BLOCKS>& packed, Tile& tile, int first_row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    unsigned char* const row_smem = tile.bytes + row * Tile::kPitch + 4 * (lane % 4);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) *reinterpret_cast<uint32_t*>(row_smem + Tile::offset_in_row(row, n)) = packed[n][half];
  }
}

// multiply_add of packed weights.
template <Dtype DTYPE, int BLOCKS, int OUT_BLOCKS, class ValueTile>
FA_DEVICE void multiply_add_packed(Accumulators<1, OUT_BLOCKS>& out, const PackedWeights<BLOCKS>& weights,
                                   const LaneAddress<ValueTile>& values) {
#pragma unroll
  for (int step = 0; step < BLOCKS / 2; ++step) {
    const uint32_t a[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0], weights[2 * step + 1][1]};
#pragma unroll
    for (int n = 0; n < OUT_BLOCKS; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, values.at(16 * step, n / 2));
      multiply_step<DTYPE>(out[0], n, a, b);
    }
  }
}

// out (16 * MATRICES x 8 * OUT_BLOCKS) += weights (16 * MATRICES x 8 * BLOCKS), rounded to DTYPE, times values (8 * BLOCKS x 8 *
// OUT_BLOCKS). Two accumulator blocks side by side lie as the a operand does.
template <Dtype DTYPE, int MATRICES, int BLOCKS, int OUT_BLOCKS, class ValueTile>
FA_DEVICE void multiply_add(Accumulators<MATRICES, OUT_BLOCKS>& out, const Accumulators<MATRICES, BLOCKS>& weights,
                            const LaneAddress<ValueTile>& values) {
#pragma unroll
  for (int step = 0; step < BLOCKS / 2; ++step) {
    uint32_t a[MATRICES][4];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&block)[4] = weights[m][2 * step + i / 2];
        a[m][i] = ptx::pack<DTYPE>(block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < OUT_BLOCKS; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, values.at(16 * step, n / 2));
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) multiply_step<DTYPE>(out[m], n, a[m], b);
    }
  }
}

}  // namespace fused_attention::cuda
