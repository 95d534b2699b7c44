// SPDX-License-Identifier: Apache-2.0
// From the products Q K^T of a warp to its scores in log2 units: softcap, float mask and ALiBi, each a branch that a whole block takes.
#pragma once
#include <type_traits>

#include "bias.cuh"

namespace fused_attention::cuda {

struct NoBias {
  FA_DEVICE NoBias(const AttentionProblem&, int64_t, int64_t) {}
};

// What turns products into scores. Without softcap, bias and slope that is one factor, which is left to the softmax.
struct ScoreTransform {
  float factor, softcap_log2, slope_log2;

  FA_DEVICE ScoreTransform(const ForwardArguments& arguments, int64_t batch, int64_t head)
      : factor(arguments.score_scale), softcap_log2(arguments.softcap_log2), slope_log2(0.0f) {
    const AttentionProblem& problem = arguments.problem;
    if (problem.alibi_slopes != nullptr) {
      slope_log2 = problem.alibi_slopes[batch * problem.alibi_slopes_batch + head * problem.alibi_slopes_head] * kLog2E;
    }
  }

  // Returns the factor that is left. bias: NoBias, or a Bias that is loaded.
  template <int MATRICES, int BLOCKS, class BiasOrNone>
  FA_DEVICE float apply(Accumulators<MATRICES, BLOCKS>& scores, int offset, int first_row, int start_n, const BiasOrNone& bias) const {
    float left = factor;
    if (softcap_log2 != 0.0f) {
      for_each_element(scores, [&](float& score, int, int) { score = accurate_tanh(score * factor) * softcap_log2; });
      left = 1.0f;
    }
    if constexpr (!std::is_same_v<BiasOrNone, NoBias>) {
      bias.add_to(scores, left);
      left = 1.0f;
    }
    if (slope_log2 != 0.0f) {
      const int diagonal = first_row + offset - start_n;
      for_each_element(scores, [&](float& score, int row, int key) {
        score = fmaf(score, left, -slope_log2 * static_cast<float>(abs(key - row - diagonal)));
      });
      left = 1.0f;
    }
    return left;
  }
};

}  // namespace fused_attention::cuda
