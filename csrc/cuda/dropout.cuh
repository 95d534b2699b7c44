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

  // Weights that are dropped become 0. first_row and start_n are multiples of 16.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE void apply(Accumulators<MATRICES, BLOCKS>& weights, int first_row, int start_n) const {
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
            if ((e % 2 == 0 ? word << 16 : word) < threshold) weights[m][n + right][e] = 0.0f;
          }
        }
      }
    }
  }
};

}  // namespace fused_attention::cuda
