// SPDX-License-Identifier: Apache-2.0
// A float attn_mask: a warp loads its piece into registers before it computes the scores, and adds it after.
#pragma once
#include <type_traits>

#include "mask.cuh"

namespace fused_attention::cuda {

// TRANSPOSED: of a tile of keys x rows; below, read "row" as key and "key" as row.
template <int MATRICES, int BLOCKS, bool TRANSPOSED = false>
class Bias {
 public:
  FA_DEVICE Bias(const AttentionProblem& problem, int64_t batch, int64_t head)
      : dtype_(problem.attn_mask_dtype),
        num_keys_(static_cast<int>(TRANSPOSED ? problem.seqlen_q : problem.seqlen_k)),
        row_stride_(TRANSPOSED ? problem.attn_mask_key : problem.attn_mask.row),
        key_stride_(TRANSPOSED ? problem.attn_mask.row : problem.attn_mask_key) {
    const int bytes = dtype_ == MaskDtype::float32 ? 4 : 2;
    base_ = static_cast<const unsigned char*>(problem.attn_mask.data) +
            (batch * problem.attn_mask.batch + head * problem.attn_mask.head) * bytes;
    const int64_t steps = problem.attn_mask.batch | problem.attn_mask.head | row_stride_;
    in_pairs_ = !TRANSPOSED && key_stride_ == 1 && (reinterpret_cast<intptr_t>(problem.attn_mask.data) | steps * bytes) % (2 * bytes) == 0;
  }

  // Rows from first_row on, repeating the last one, and keys from start_n on, 0 past the last one.
  FA_DEVICE void load(int first_row, int last_row, int start_n) {
    if (dtype_ == MaskDtype::float32) {
      load_elements<uint32_t>(first_row, last_row, start_n);
    } else {
      load_elements<uint16_t>(first_row, last_row, start_n);
    }
  }

  // Adds the mask to scores times scale, in log2 units; -inf where it masks. Returns the scale that is left to apply.
  FA_DEVICE float add_to(Accumulators<MATRICES, BLOCKS>& scores, float scale) const {
    switch (dtype_) {
      case MaskDtype::float32:
        add(scores, scale, [](const uint32_t (&words)[2], int e) { return __uint_as_float(words[e]); });
        break;
      case MaskDtype::bfloat16:
        add(scores, scale,
            [](const uint32_t (&words)[2], int e) { return __uint_as_float(e == 0 ? words[0] << 16 : words[0] & 0xffff0000); });
        break;
      default:
        add(scores, scale, [](const uint32_t (&words)[2], int e) { return ptx::from_half(static_cast<uint16_t>(words[0] >> (16 * e))); });
    }
    return 1.0f;
  }

 private:
  template <class Element>
  FA_DEVICE void load_elements(int first_row, int last_row, int start_n) {
    const int lane = ptx::again(threadIdx.x) % 32, first_key = start_n + 2 * (lane % 4);
    const bool all_in_pairs = in_pairs_ && start_n + 8 * BLOCKS <= num_keys_;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + 16 * m + 8 * half + lane / 4, last_row);
        const Element* elements = reinterpret_cast<const Element*>(base_) + row * row_stride_ + first_key * key_stride_;
        if (all_in_pairs) {
#pragma unroll
          for (int n = 0; n < BLOCKS; ++n) {
            uint32_t (&words)[2] = words_[m][n][half];
            if constexpr (sizeof(Element) == 4) {
              const uint2 two = *reinterpret_cast<const uint2*>(elements + 8 * n);
              words[0] = two.x, words[1] = two.y;
            } else {
              words[0] = *reinterpret_cast<const uint32_t*>(elements + 8 * n);
            }
          }
        } else {
#pragma unroll
          for (int n = 0; n < BLOCKS; ++n) {
            uint32_t pair[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) pair[e] = first_key + 8 * n + e < num_keys_ ? elements[(8 * n + e) * key_stride_] : 0;
            uint32_t (&words)[2] = words_[m][n][half];
            words[0] = sizeof(Element) == 4 ? pair[0] : pair[0] | pair[1] << 16, words[1] = pair[1];
          }
        }
      }
    }
  }

  template <class AsFloat>
  FA_DEVICE void add(Accumulators<MATRICES, BLOCKS>& scores, float scale, AsFloat as_float) const {
    for_each_of_lane<MATRICES, BLOCKS>([&](int m, int n, int e) {
      const float bias = as_float(words_[m][n][e / 2], e % 2);
      scores[m][n][e] = bias < kMaskedBelow ? -kInfinity : fmaf(scores[m][n][e], scale, bias * kLog2E);
    });
  }

  const unsigned char* base_;
  MaskDtype dtype_;
  bool in_pairs_;  // two keys per access
  int num_keys_;
  int64_t row_stride_, key_stride_;
  uint32_t words_[MATRICES][BLOCKS][2][2];  // keys 2 (lane % 4) and the next, rows lane / 4 and 8 below: one word each, or one for both
};

struct NoBias {
  FA_DEVICE NoBias(const AttentionProblem&, int64_t, int64_t) {}
  FA_DEVICE void load(int, int, int) {}
  template <class Scores>
  FA_DEVICE float add_to(Scores&, float scale) const {
    return scale;
  }
};

}  // namespace fused_attention::cuda
