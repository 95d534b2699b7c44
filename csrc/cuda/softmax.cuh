// SPDX-License-Identifier: Apache-2.0
// Online softmax over the keys of a warp's rows (Milakov and Gimelshein, arXiv 1805.02867), in powers of two.
//
// Rows that have seen no key yet have row_max -inf and row_sum 0; what that means for weights, out and lse is decided only here.
#pragma once
#include "tile.cuh"

namespace fused_attention::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr uint32_t kWholeWarp = 0xffffffff;

FA_DEVICE float quad_max(float x) {  // of the four lanes that share rows of an accumulator
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

FA_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

// Over LANES consecutive lanes; every lane gets the sum.
template <int LANES = 32>
FA_DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// float32, to float32 accuracy also where tanh(x) is about x.
FA_DEVICE float accurate_tanh(float x) {
  const float square = x * x;
  // The Taylor series, for |x| < 0.3 (next term: 3e-10 relative).
  float series = fmaf(square, -1382.0f / 155925.0f, 62.0f / 2835.0f);
  series = fmaf(square, series, -17.0f / 315.0f);
  series = fmaf(square, series, 2.0f / 15.0f);
  series = fmaf(square, series, -1.0f / 3.0f);
  series = fmaf(x * square, series, x);
  const float far = 1.0f - __fdividef(2.0f, ptx::ex2(fminf(fabsf(x), 20.0f) * (2.0f * kLog2E)) + 1.0f);
  const float result = fabsf(x) < 0.3f ? series : copysignf(far, x);
  return x == x ? result : x;  // fminf drops NaN
}

template <int MATRICES>
struct OnlineSoftmax {
  float row_max[MATRICES][2];  // of rows lane / 4 and 8 below, log2 units
  float row_sum[MATRICES][2];  // this lane's part of the sum of 2^(score - row_max)

  // first(m, half): log2 of a weight that the row starts with and that has no value, or -inf.
  template <class First>
  FA_DEVICE explicit OnlineSoftmax(First first) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = first(m, half);
        row_sum[m][half] = row_max[m][half] != -kInfinity && threadIdx.x % 4 == 0 ? 1.0f : 0.0f;
      }
    }
  }

  // Turns scores, times scale > 0 in log2 units, into weights relative to row_max, and rescales out, the sum so far, to match.
  // SOME_MASKED: a score may be -inf.
  template <bool SOME_MASKED, int BLOCKS, int OUT_BLOCKS>
  FA_DEVICE void update(Accumulators<MATRICES, BLOCKS>& scores, float scale, Accumulators<MATRICES, OUT_BLOCKS>& out) {
    float rescale[MATRICES][2];
    bool risen = false;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        const float new_max = fmaxf(row_max[m][half], quad_max(largest) * scale);
        const float shift = SOME_MASKED && new_max == -kInfinity ? 0.0f : new_max;
        rescale[m][half] = ptx::ex2(row_max[m][half] - shift);
        risen = risen || new_max != row_max[m][half];
        row_max[m][half] = new_max;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n][e] = ptx::ex2(fmaf(scores[m][n][e], scale, -shift));
            sum += scores[m][n][e];
          }
        }
        row_sum[m][half] = fmaf(row_sum[m][half], rescale[m][half], sum);
      }
    }
    if (__any_sync(kWholeWarp, risen)) {  // rare: a row's largest score is usually among its first keys
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
        for (int n = 0; n < OUT_BLOCKS; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[m][n][e] *= rescale[m][e / 2];
        }
      }
    }
  }

  // For whole rows at once: raises row_max to at least `score`, in log2 units. Returns what to subtract from scores before exp2.
  FA_DEVICE float raise(int m, int half, float score) {
    const float new_max = fmaxf(row_max[m][half], score), shift = new_max == -kInfinity ? 0.0f : new_max;
    row_sum[m][half] *= ptx::ex2(row_max[m][half] - shift);
    row_max[m][half] = new_max;
    return shift;
  }

  FA_DEVICE void sum_over_quads() {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_sum[m][half] = quad_sum(row_sum[m][half]);
    }
  }

  // After sum_over_quads. A row that attends to nothing has row_sum 0 (one of NaN scores has row_max -inf too, but row_sum NaN).
  FA_DEVICE bool saw_something(int m, int half) const { return row_sum[m][half] != 0.0f; }
  FA_DEVICE float lse(int m, int half) const {  // natural logarithm
    return saw_something(m, half) ? (row_max[m][half] + ptx::lg2(row_sum[m][half])) * kLn2 : -kInfinity;
  }
  FA_DEVICE float reciprocal_sum(int m, int half) const { return saw_something(m, half) ? ptx::rcp(row_sum[m][half]) : 0.0f; }
};

}  // namespace fused_attention::cuda
