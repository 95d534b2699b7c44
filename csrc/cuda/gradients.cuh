// SPDX-License-Identifier: Apache-2.0
// From a warp's scores to their gradients, on tiles of rows x keys and on transposed tiles of keys x rows.
//
//   P = exp2(scores - lse), in log2 units; D = dropout's factors; dweights = dout V^T
//   dscores = P * (D * dweights - delta)
#pragma once
#include "backward_arguments.h"
#include "dropout.cuh"
#include "row_block.cuh"
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

// Turns scores, times scale in log2 units, into weights.
//   lse_of(m, n, e): of that element's row, +inf if it attends to nothing
//   CLAMPED: for a row whose mask is -1e8 everywhere, scores and lse round to a few log2 units, not always as in the forward
template <bool CLAMPED, int MATRICES, int BLOCKS, class LseOf>
FA_DEVICE void scores_to_weights(Accumulators<MATRICES, BLOCKS>& scores, float scale, LseOf lse_of) {
  for_each_of_lane<MATRICES, BLOCKS>([&](int m, int n, int e) {
    const float exponent = fmaf(scores[m][n][e], scale, -lse_of(m, n, e));
    scores[m][n][e] = ptx::ex2(CLAMPED && exponent > 0.0f ? 0.0f : exponent);
  });
}

// Turns dweights into gradients of scores. Weights that dropout marked with a minus sign become 0.
//   SELECT: where a weight is 0 the gradient is 0, even if that of the weight is infinite
template <bool SELECT, int MATRICES, int BLOCKS, class DeltaOf>
FA_DEVICE void weights_to_score_gradients(Accumulators<MATRICES, BLOCKS>& dweights, Accumulators<MATRICES, BLOCKS>& weights, bool drops,
                                          float kept_scale, DeltaOf delta_of) {
  for_each_of_lane<MATRICES, BLOCKS>([&](int m, int n, int e) {
    float &weight = weights[m][n][e], &gradient = dweights[m][n][e];
    const bool dropped = drops && weight < 0.0f;
    if (drops) gradient = dropped ? 0.0f : gradient * kept_scale;
    const float dscore = fabsf(weight) * (gradient - delta_of(m, n, e));
    gradient = SELECT && weight == 0.0f ? 0.0f : dscore;
    if (dropped) weight = 0.0f;
  });
}

// Sets weights that dropout marked with a minus sign to 0.
template <int BLOCKS>
FA_DEVICE void drop_marked(Accumulators<1, BLOCKS>& weights) {
  for_each_element(weights, [](float& weight, int, int) { weight = weight < 0.0f ? 0.0f : weight; });
}

// Stores the gradients of scores, up to row num_rows, as those of a float mask.
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

// Sets the masked scores of a transposed tile (a warp's 16 keys x 8 * BLOCKS rows) to -inf.
template <bool BY_POSITION, int BLOCKS>
FA_DEVICE void mask_transposed(const ScoreMask& mask, Accumulators<1, BLOCKS>& scores, int first_key, int start_m) {
  constexpr int kWords = (BLOCKS + 3) / 4;
  const Sequence& sequence = mask.sequence;
  const AttentionProblem& problem = mask.problem;
  const int lane = threadIdx.x % 32, first_row = start_m + 2 * (lane % 4);
  const uint32_t* const bits = of_head(problem.mask_bits.data, problem.mask_bits.batch, mask.batch, problem.mask_bits.head, mask.head);
  uint32_t allowed[2][kWords] = {};  // bits 8 n and 8 n + 1: this lane's elements of block n
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
    const int bit = first_key % 32 + lane / 4;  // of the key in its word; the lane's other key is 8 higher
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

// From a warp's products Q K^T and dO V^T to the gradients of its scores, on a tile of 16 lines of one head. Lines are rows and columns are
// keys, or the other way around if TRANSPOSED.
template <FeatureClass CLASS, bool TRANSPOSED>
struct ScoreGradientStep {
  static constexpr bool kPlain = CLASS == FeatureClass::plain, kBias = CLASS == FeatureClass::bias, kTransposed = TRANSPOSED;

  const BackwardArguments& arguments;
  const ScoreMask& head_mask;
  int first_line, first_column;  // of the tile, in the sequence
  bool drops;                    // whether there is dropout
  int lane;

  // Turns products into scores, up to the factor that is returned: softcap, float mask, ALiBi. write_derivative: with a softcap, called as
  // soon as its derivative is known.
  template <int BLOCKS, class WriteDerivative>
  FA_DEVICE float transform(Accumulators<1, BLOCKS>& scores, Accumulators<1, BLOCKS>& softcap_derivative,
                            WriteDerivative write_derivative) const {
    if constexpr (kPlain) {
      return arguments.score_scale;
    } else {
      const AttentionProblem& problem = arguments.problem;
      const Sequence& sequence = head_mask.sequence;
      const ScoreTransform of_head(arguments, head_mask.batch, head_mask.head);
      float scale = of_head.cap(scores, softcap_derivative);
      if (arguments.softcap_log2 != 0.0f) write_derivative();
      if constexpr (kBias) {
        Bias<1, BLOCKS, TRANSPOSED> bias(problem, head_mask.batch, head_mask.head);
        bias.load(first_line, (TRANSPOSED ? static_cast<int>(problem.seqlen_k) : sequence.rows_present) - 1, first_column);
        scale = bias.add_to(scores, scale);
      }
      return of_head.add_alibi(scores, scale, TRANSPOSED ? -sequence.offset : sequence.offset, first_line, first_column);
    }
  }
  template <int BLOCKS>
  FA_DEVICE float transform(Accumulators<1, BLOCKS>& scores, Accumulators<1, BLOCKS>& softcap_derivative) const {
    return transform(scores, softcap_derivative, [] {});
  }

  // Sets masked scores to -inf.
  template <int BLOCKS>
  FA_DEVICE void mask(Accumulators<1, BLOCKS>& scores) const {
    if constexpr (TRANSPOSED) {
      mask_transposed<kPlain>(head_mask, scores, first_line, first_column);
    } else {
      head_mask.apply<kPlain>(scores, [&](int, int half) { return first_line + 8 * half + lane / 4; }, first_column);
    }
  }

  // P, with a minus sign where dropout drops. lse_of(m, n, e): of that element's row, +inf if it attends to nothing.
  template <int BLOCKS, class LseOf>
  FA_DEVICE void to_weights(Accumulators<1, BLOCKS>& scores, float scale, LseOf lse_of) const {
    scores_to_weights<kBias>(scores, scale, lse_of);
    if (!drops) return;
    const Dropout dropout(arguments.problem, head_mask.batch, head_mask.head);
    if constexpr (TRANSPOSED) {
      dropout.mark_transposed(scores, first_line, first_column);
    } else {
      dropout.mark(scores, first_line, first_column);
    }
  }

  // Turns dP into dS, and clears dropped weights.
  //   SELECT: as in weights_to_score_gradients, if scores may be masked
  //   delta_of(m, n, e): of that element's row
  template <bool SELECT, int BLOCKS, class DeltaOf>
  FA_DEVICE void to_gradients(Accumulators<1, BLOCKS>& gradients, Accumulators<1, BLOCKS>& weights, DeltaOf delta_of) const {
    weights_to_score_gradients<SELECT || kBias>(gradients, weights, drops, arguments.kept_scale, delta_of);
  }

  // Turns gradients of scores into those of products, up to their scale. read_derivative: with a softcap, called before its derivative is
  // needed.
  template <int BLOCKS, class ReadDerivative>
  FA_DEVICE void through_softcap(Accumulators<1, BLOCKS>& gradients, const Accumulators<1, BLOCKS>& softcap_derivative,
                                 ReadDerivative read_derivative) const {
    if constexpr (!kPlain) {
      if (arguments.softcap_log2 == 0.0f) return;
      read_derivative();
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) gradients[0][n][e] *= softcap_derivative[0][n][e];
      }
    }
  }
  template <int BLOCKS>
  FA_DEVICE void through_softcap(Accumulators<1, BLOCKS>& gradients, const Accumulators<1, BLOCKS>& softcap_derivative) const {
    through_softcap(gradients, softcap_derivative, [] {});
  }
};

// A lane's sums of gradients of scores while its warp walks along its lines.
struct ScoreGradientSums {
  float lines[2] = {};  // this lane's part of two lines
  float slope = 0.0f;   // of the gradient of the head's slope

  template <int BLOCKS>
  FA_DEVICE void add_lines(Accumulators<1, BLOCKS>& gradients) {
    for_each_element(gradients, [&](float& gradient, int line, int) { lines[line / 8] += gradient; });
  }
  template <int BLOCKS, class Step>
  FA_DEVICE void add_slope(Accumulators<1, BLOCKS>& gradients, const Step& step) {
    const int offset = step.head_mask.sequence.offset;
    const int diagonal = step.first_line + (Step::kTransposed ? -offset : offset) - step.first_column;
    for_each_element(gradients,
                     [&](float& gradient, int line, int column) { slope -= gradient * static_cast<float>(abs(column - line - diagonal)); });
  }

  // target: (num_lines,), from the warp's first line on.
  FA_DEVICE void store_lines(float* target, int num_lines) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = 8 * half + lane / 4;
      const float sum = quad_sum(lines[half]);
      if (lane % 4 == 0 && line < num_lines) target[line] = sum;
    }
  }
};

// Stores a block of rows' share of the gradient of its head's slope. The whole block calls it.
//   slope: this lane's share
//   part: this warp's index among the NUM_PARTS that have a share, NUM_PARTS if it has none
//   shared: room for NUM_PARTS floats
template <int NUM_PARTS, int BLOCK_M>
FA_DEVICE void store_slope_part(const BackwardArguments& arguments, const RowBlock<BLOCK_M>& block, float slope, int part, void* shared) {
  static_assert(BLOCK_M == kRowsPerSlopePart);
  float* const sums = static_cast<float*>(shared);
  const float of_warp = sum_of_lanes(slope);
  if (threadIdx.x % 32 == 0 && part < NUM_PARTS) sums[part] = of_warp;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < NUM_PARTS; ++i) sum += sums[i];
  const AttentionProblem& problem = arguments.problem;
  const int64_t row_blocks = (problem.seqlen_q + BLOCK_M - 1) / BLOCK_M;
  arguments.slope_sums[(block.batch * problem.num_heads + block.head) * row_blocks + block.start_m / BLOCK_M] = sum;
}

}  // namespace fused_attention::cuda
