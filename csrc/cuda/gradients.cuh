// SPDX-License-Identifier: Apache-2.0
// From the scores of a warp to their gradients, on tiles of rows x keys and on transposed ones of keys x rows.
//
//   P = exp2(scores - lse), in log2 units; D = dropout's factors; dweights = dout V^T
//   dscores = P * (D * dweights - delta)
#pragma once
#include "backward_arguments.h"
#include "dropout.cuh"
#include "scores.cuh"

namespace fused_attention::cuda {

// sum + the products of eight elements of DTYPE each.
template <Dtype DTYPE>
FA_DEVICE float add_dot(float sum, uint4 left, uint4 right) {
  const auto as_float = [](uint32_t bits) {
    return DTYPE == Dtype::bfloat16 ? __uint_as_float(bits << 16) : ptx::from_half(static_cast<uint16_t>(bits));
  };
  const uint32_t left_words[4] = {left.x, left.y, left.z, left.w}, right_words[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(as_float(left_words[i] & 0xffff), as_float(right_words[i] & 0xffff), sum);
    sum = fmaf(as_float(left_words[i] >> 16), as_float(right_words[i] >> 16), sum);
  }
  return sum;
}

// products become scores with softcap, times the factor that is returned; slopes: what softcap multiplies gradients by.
template <int MATRICES, int BLOCKS>
FA_DEVICE float cap_with_slopes(const ScoreTransform& transform, Accumulators<MATRICES, BLOCKS>& products,
                                Accumulators<MATRICES, BLOCKS>& slopes) {
  if (transform.softcap_log2 == 0.0f) return transform.factor;
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float capped = accurate_tanh(products[m][n][e] * transform.factor);
        slopes[m][n][e] = fmaf(-capped, capped, 1.0f);
        products[m][n][e] = capped * transform.softcap_log2;
      }
    }
  }
  return 1.0f;
}

// scores, times scale in log2 units, become weights.
//   lse_of(m, n, e): of the row of that element, +inf where it attends to nothing
//   CLAMPED: a mask of -1e8 in a whole row leaves scores and lse some log2 units of rounding, which may differ from the forward's
template <bool CLAMPED, int MATRICES, int BLOCKS, class LseOf>
FA_DEVICE void scores_to_weights(Accumulators<MATRICES, BLOCKS>& scores, float scale, LseOf lse_of) {
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float exponent = fmaf(scores[m][n][e], scale, -lse_of(m, n, e));
        scores[m][n][e] = ptx::ex2(CLAMPED && exponent > 0.0f ? 0.0f : exponent);
      }
    }
  }
}

// dweights become gradients of scores. weights that dropout dropped carry a minus sign, which is lost: they become 0.
//   SELECT: where a weight is 0 the gradient is 0, though that of the weight may be infinite
template <bool SELECT, int MATRICES, int BLOCKS, class DeltaOf>
FA_DEVICE void weights_to_score_gradients(Accumulators<MATRICES, BLOCKS>& dweights, Accumulators<MATRICES, BLOCKS>& weights, bool drops,
                                          float kept_scale, DeltaOf delta_of) {
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float &weight = weights[m][n][e], &gradient = dweights[m][n][e];
        const bool dropped = drops && weight < 0.0f;
        if (drops) gradient = dropped ? 0.0f : gradient * kept_scale;
        const float dscore = fabsf(weight) * (gradient - delta_of(m, n, e));
        gradient = SELECT && weight == 0.0f ? 0.0f : dscore;
        if (dropped) weight = 0.0f;
      }
    }
  }
}

// Stores gradients of scores, of rows below num_rows, where they are those of a float mask.
template <int BLOCKS>
FA_DEVICE void store_mask_gradient(const BackwardArguments& arguments, const Accumulators<1, BLOCKS>& gradients, int mask_batch,
                                   int mask_head, int first_row, int num_rows, int start_n) {
  const AttentionProblem& problem = arguments.problem;
  const StridedTensor& target = arguments.dattn_mask;
  const int lane = threadIdx.x % 32, first_key = start_n + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
    const int keys_left = row < num_rows ? static_cast<int>(problem.seqlen_k) - first_key : 0;
    const int64_t place = mask_batch * target.batch + mask_head * target.head + row * target.row + first_key;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * n + e >= keys_left) continue;
        const float gradient = gradients[0][n][2 * half + e];
        if (problem.attn_mask_dtype == MaskDtype::float32) {
          static_cast<float*>(target.data)[place + 8 * n + e] = gradient;
        } else {
          const uint32_t rounded = problem.attn_mask_dtype == MaskDtype::bfloat16 ? ptx::pack<Dtype::bfloat16>(gradient, 0.0f)
                                                                                  : ptx::pack<Dtype::float16>(gradient, 0.0f);
          static_cast<uint16_t*>(target.data)[place + 8 * n + e] = static_cast<uint16_t>(rounded);
        }
      }
    }
  }
}

// Which scores of a transposed tile (16 keys of a warp x 8 * BLOCKS rows) count; the others become -inf.
template <bool BY_POSITION, int BLOCKS>
FA_DEVICE void mask_transposed(const ScoreMask& mask, Accumulators<1, BLOCKS>& scores, int first_key, int start_m) {
  constexpr int kWords = (BLOCKS + 3) / 4;
  const Sequence& sequence = mask.sequence;
  const AttentionProblem& problem = mask.problem;
  const int lane = threadIdx.x % 32, first_row = start_m + 2 * (lane % 4);
  const uint32_t* const bits = of_head(problem.mask_bits.data, problem.mask_bits.batch, mask.batch, problem.mask_bits.head, mask.head);
  uint32_t allowed[2][kWords] = {};  // bits 8 n and 8 n + 1 are those of this lane's elements of block n
  if (BY_POSITION || bits == nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + 8 * half + lane / 4;
      const bool exists = BY_POSITION ? key < sequence.keys_present : mask.key_exists(key);
      const KeyRange rows = sequence.rows_of(key);
#pragma unroll
      for (int word = 0; word < kWords; ++word) allowed[half][word] = exists ? bits_of(rows, start_m + 32 * word) >> 2 * (lane % 4) : 0;
    }
  } else {
    const int bit = first_key % 32 + lane / 4;  // of the key in its word; that of the other one is 8 higher
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first_row + 8 * n + e;
        const bool readable = row < sequence.rows_present && first_key < problem.seqlen_k;
        const uint32_t word = readable ? bits[row * problem.mask_bits.line + first_key / 32] >> bit : 0;
        allowed[0][n / 4] |= (word & 1) << (n % 4 * 8 + e);
        allowed[1][n / 4] |= (word >> 8 & 1) << (n % 4 * 8 + e);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if ((allowed[e / 2][n / 4] >> (n % 4 * 8 + e % 2) & 1) == 0) scores[0][n][e] = -kInfinity;
    }
  }
}

}  // namespace fused_attention::cuda
