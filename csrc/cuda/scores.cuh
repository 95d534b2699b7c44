// SPDX-License-Identifier: Apache-2.0
// From a warp's products Q K^T to its scores in log2 units: softcap and ALiBi, each a branch that is uniform in a block.
#pragma once
#include "bias.cuh"

namespace fused_attention::cuda {

// With neither, scores are products times a factor, which the softmax applies.
struct ScoreTransform {
  float factor, softcap_log2, slope_log2;

  FA_DEVICE ScoreTransform(const ForwardArguments& arguments, int64_t batch, int64_t head)
      : factor(arguments.score_scale), softcap_log2(arguments.softcap_log2), slope_log2(0.0f) {
    const AttentionProblem& problem = arguments.problem;
    if (problem.alibi_slopes != nullptr) {
      slope_log2 = problem.alibi_slopes[batch * problem.alibi_slopes_batch + head * problem.alibi_slopes_head] * kLog2E;
    }
  }

  // Softcap. Returns the factor that is left to apply.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE float cap(Accumulators<MATRICES, BLOCKS>& scores) const {
    if (softcap_log2 == 0.0f) return factor;
    for_each_element(scores, [&](float& score, int, int) { score = accurate_tanh(score * factor) * softcap_log2; });
    return 1.0f;
  }

  // The same, and with a softcap its derivative, by which gradients are multiplied.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE float cap(Accumulators<MATRICES, BLOCKS>& scores, Accumulators<MATRICES, BLOCKS>& softcap_derivative) const {
    if (softcap_log2 == 0.0f) return factor;
    for_each_of_lane<MATRICES, BLOCKS>([&](int m, int n, int e) {
      const float capped = accurate_tanh(scores[m][n][e] * factor);
      softcap_derivative[m][n][e] = fmaf(-capped, capped, 1.0f);
      scores[m][n][e] = capped * softcap_log2;
    });
    return 1.0f;
  }

  // factor_left: what scores have yet to be multiplied by; returns what is left after this. On a transposed tile, keys x rows, "row" is a
  // key, "key" is a row and the offset is negated.
  template <int MATRICES, int BLOCKS>
  FA_DEVICE float add_alibi(Accumulators<MATRICES, BLOCKS>& scores, float factor_left, int offset, int first_row, int start_n) const {
    if (slope_log2 == 0.0f) return factor_left;
    const int diagonal = first_row + offset - start_n;
    for_each_element(scores, [&](float& score, int row, int key) {
      score = fmaf(score, factor_left, -slope_log2 * static_cast<float>(abs(key - row - diagonal)));
    });
    return 1.0f;
  }
};

}  // namespace fused_attention::cuda
