// SPDX-License-Identifier: Apache-2.0
// Dropout on weights in the registers of a warp: one draw of Philox (philox.h) covers what one lane holds of a 16 x 16 piece.
#pragma once
#include "../philox.h"
#include "mask.cuh"

namespace fused_attention::cuda {

struct Dropout {
  PhiloxKey key;
  uint32_t threshold;  // in the upper half of the word
  uint32_t batch_head;

  Dropout() = default;
  FA_DEVICE Dropout(const AttentionProblem& problem, int64_t batch, int64_t head)
      : key(PhiloxKey::from_rng_state(problem.rng_state)),
        threshold(problem.dropout_threshold << 16),
        batch_head(static_cast<uint32_t>(batch * problem.num_heads + head)) {}

  // Sets dropped weights to 0. first_row and start_n are multiples of 16.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE void apply(Accumulators<MATRICES, BLOCKS>& weights, int first_row, int start_n) const {
    for_each_dropped(weights, first_row, start_n, [](float& weight) { weight = 0.0f; });
  }

  // Negates dropped weights.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE void mark(Accumulators<MATRICES, BLOCKS>& weights, int first_row, int start_n) const {
    for_each_dropped(weights, first_row, start_n, [](float& weight) { weight = -weight; });
  }

  // The same for a transposed tile, a warp's 16 keys x rows. A draw covers a pair of keys, of which a lane holds one and lane ^ 4 the
  // other: each draws for one of their two adjacent rows, and they exchange halves of the words.
  template <int BLOCKS>
  FA_DEVICE void mark_transposed(Accumulators<1, BLOCKS>& weights, int first_key, int start_m) const {
    const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
      uint32_t words[4] = {static_cast<uint32_t>(first_key / 16) * 4 + lane / 8,
                           static_cast<uint32_t>(start_m / 16 + n / 2) * 8 + 2 * (lane % 4) + odd, batch_head, key.offset};
      philox4x32(words, key.key0, key.key1);
      // words[i]: rows i / 2 * 8 below the pair, keys i % 2 * 8 after this lane's; own: drawn by this lane, other: by lane ^ 4.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000;  // the even and the odd key
        const uint32_t own = odd ? high : low, other = __shfl_xor_sync(kWholeWarp, odd ? low : high, 4);
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // adjacent rows
          float& weight = weights[0][n + i / 2][i % 2 * 2 + e];
          if ((e == odd ? own : other) < threshold) weight = -weight;
        }
      }
    }
  }

 private:
  template <int MATRICES, int BLOCKS, class Drop>
  FA_DEVICE void for_each_dropped(Accumulators<MATRICES, BLOCKS>& weights, int first_row, int start_n, Drop drop) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int n = 0; n < BLOCKS; n += 2) {
        uint32_t words[4] = {static_cast<uint32_t>(start_n / 16 + n / 2) * 4 + lane % 4,
                             static_cast<uint32_t>(first_row / 16 + m) * 8 + lane / 4, batch_head, key.offset};
        philox4x32(words, key.key0, key.key1);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int right = 0; right < 2; ++right) {
            const uint32_t word = words[e / 2 * 2 + right];
            if ((e % 2 == 0 ? word << 16 : word) < threshold) drop(weights[m][n + right][e]);
          }
        }
      }
    }
  }
};

}  // namespace fused_attention::cuda
