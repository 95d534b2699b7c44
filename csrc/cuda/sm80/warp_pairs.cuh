// SPDX-License-Identifier: Apache-2.0
// How the backward above head_dim 128 splits its work among eight warps. What a warp keeps in registers, 16 rows of a left operand and sums
// as wide as the head, does not fit twice, so four pairs of warps take 16 rows, or 16 keys, each:
//
//   the weights' warp    scores and weights, and the sums that need weights
//   the gradients' warp  gradients of weights and of scores, and the sums that need those
//
// They exchange data through shared memory in the order of the lanes' registers, which needs no swizzle.
#pragma once
#include "../tile.cuh"

namespace fused_attention::cuda::sm80 {

constexpr int kPairs = 4, kPairedThreads = 2 * kPairs * 32;

struct WarpPair {
  int number, lane;
  bool has_weights;  // whether this is the weights' warp

  FA_DEVICE WarpPair()
      : number(static_cast<int>(threadIdx.x / 32 % kPairs)),
        lane(static_cast<int>(threadIdx.x % 32)),
        has_weights(threadIdx.x < kPairedThreads / 2) {}

  // Barrier 0 is the block's. One warp announces what the other awaits.
  FA_DEVICE void announce(int what) const { ptx::barrier_arrive(1 + what * kPairs + number, 2 * 32); }
  FA_DEVICE void await(int what) const { ptx::barrier_sync(1 + what * kPairs + number, 2 * 32); }

  // buffer: (pairs, BLOCKS * 128), aligned to 16 bytes.
  template <int BLOCKS>
  FA_DEVICE void put(float* buffer, const Accumulators<1, BLOCKS>& numbers) const {
    float4* const target = reinterpret_cast<float4*>(buffer) + number * BLOCKS * 32 + lane;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) target[n * 32] = {numbers[0][n][0], numbers[0][n][1], numbers[0][n][2], numbers[0][n][3]};
  }
  template <int BLOCKS>
  FA_DEVICE void take(const float* buffer, Accumulators<1, BLOCKS>& numbers) const {
    const float4* const source = reinterpret_cast<const float4*>(buffer) + number * BLOCKS * 32 + lane;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
      const float4 four = source[n * 32];
      numbers[0][n][0] = four.x, numbers[0][n][1] = four.y, numbers[0][n][2] = four.z, numbers[0][n][3] = four.w;
    }
  }
};

// What the weights' warp or the gradients' warp works with.
template <bool WEIGHTS, class OfWeights, class OfGradients>
FA_DEVICE auto& either(OfWeights& of_weights, OfGradients& of_gradients) {
  if constexpr (WEIGHTS) {
    return of_weights;
  } else {
    return of_gradients;
  }
}

constexpr int kWeightsReady = 0, kGradientsReady = 1;

// 16 rows of a left operand, COLUMNS wide: the first HELD columns in registers for the whole kernel, the others in shared memory.
template <int ROWS, int COLUMNS, int HELD>
struct LeftOperand {
  static constexpr int kRest = COLUMNS - HELD;
  using HeldTile = SharedTile<ROWS, HELD>;  // only until `hold`
  using RestTile = SharedTile<ROWS, kRest == 0 ? 64 : kRest>;

  uint32_t pieces[HELD / 16][4];
  LaneAddress<RestTile> rest;

  // Copies all rows, asynchronously, by 128 threads.
  template <class Exists>
  static FA_DEVICE void copy(HeldTile& held_tile, RestTile* rest_tile, const uint16_t* source, int64_t stride, int columns, uint32_t thread,
                             Exists exists) {
    copy_rows_async<kPairedThreads / 2>(held_tile, source, stride, columns, thread, exists);
    if constexpr (kRest > 0) copy_rows_async<kPairedThreads / 2>(*rest_tile, source + HELD, stride, columns - HELD, thread, exists);
  }
  FA_DEVICE void hold(const HeldTile& held_tile, const RestTile* rest_tile, int first_row) {
    const auto held = held_tile.by_rows(first_row);
#pragma unroll
    for (int i = 0; i < HELD / 16; ++i) held(i, 0, pieces[i]);
    if constexpr (kRest > 0) rest = rest_tile->by_rows(first_row);
  }
  FA_DEVICE void operator()(int step, int, uint32_t (&a)[4]) const {
    if (16 * step >= HELD) {
      rest(step - HELD / 16, 0, a);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pieces[step][i];
    }
  }
};

// Accumulator blocks 2 * step and the next, rounded: they are laid out as the left operand already.
template <Dtype DTYPE, int BLOCKS>
FA_DEVICE void pack_operand(uint32_t (&a)[4], const Accumulators<1, BLOCKS>& numbers, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float (&block)[4] = numbers[0][2 * step + i / 2];
    a[i] = ptx::pack<DTYPE>(block[i % 2 * 2], block[i % 2 * 2 + 1]);
  }
}

// multiply_add (tile.cuh) of packed operands and the columns of a tile from 16 * FIRST on.
template <Dtype DTYPE, int FIRST, int STEPS, int OUT_BLOCKS, class Tile>
FA_DEVICE void multiply_add_packed(Accumulators<1, OUT_BLOCKS>& out, const uint32_t (&a)[STEPS][4], const LaneAddress<Tile>& right) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int n = 0; n < OUT_BLOCKS; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, right.at(16 * step, FIRST + n / 2));
      multiply_step<DTYPE>(out[0], n, a[step], b);
    }
  }
}

}  // namespace fused_attention::cuda::sm80
