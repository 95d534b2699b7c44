// SPDX-License-Identifier: Apache-2.0
// How the single-tile backward stores what does not fit in shared memory: gradients of query, and of a float mask.
#pragma once
#include "../gradients.cuh"

namespace fused_attention::cuda::sm80 {

// Four 8 x 8 blocks side by side, rounded and packed. Lane i has word i % 4 (two columns) of row i / 4 of each block, and gets all four
// words, 16 bytes, of that row of block i % 4.
FA_DEVICE void transpose_quads(uint32_t (&words)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if ((n & distance) != 0) continue;
      uint32_t &low = words[n], &high = words[n + distance];
      const uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? low : high, distance);
      if (upper) {
        low = received;
      } else {
        high = received;
      }
    }
  }
}

// store_mask_gradient for a transposed tile: a warp's 16 keys x 8 * BLOCKS rows. Every element of the mask is written once.
template <int BLOCKS>
FA_DEVICE void store_mask_gradient_transposed(const BackwardArguments& arguments, const Accumulators<1, BLOCKS>& gradients, int batch,
                                              int head, int first_key, int start_m) {
  const AttentionProblem& problem = arguments.problem;
  const StridedTensor& target = arguments.dattn_mask;
  const int64_t place = batch * target.batch + head * target.head + start_m * target.row + first_key;
  const int rows_left = static_cast<int>(problem.seqlen_q) - start_m, keys_left = static_cast<int>(problem.seqlen_k) - first_key;
  const auto store = [&](float gradient, int64_t element) {
    if (problem.attn_mask_dtype == MaskDtype::float32) {
      static_cast<float*>(target.data)[element] = gradient;
    } else {
      const uint32_t rounded = problem.attn_mask_dtype == MaskDtype::bfloat16 ? ptx::pack<Dtype::bfloat16>(gradient, 0.0f)
                                                                              : ptx::pack<Dtype::float16>(gradient, 0.0f);
      static_cast<uint16_t*>(target.data)[element] = static_cast<uint16_t>(rounded);
    }
  };
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = e / 2 * 8 + lane / 4, row = 8 * n + 2 * (lane % 4) + e % 2;
      if (key < keys_left && row < rows_left) store(gradients[0][n][e], place + row * target.row + key);
    }
  }
}

}  // namespace fused_attention::cuda::sm80
