// SPDX-License-Identifier: Apache-2.0
// Merges what decode.cuh computed from parts of the keys: out = sum_s w_s out_s with w_s = exp(lse_s - lse), lse = log(sum_s exp(lse_s)).
#pragma once
#include "mask.cuh"

namespace fused_attention::cuda {

// One row per warp, ROWS rows per block.
template <Dtype DTYPE, int ROWS>
FA_DEVICE void combine(const ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  const int lane = threadIdx.x % 32, num_splits = arguments.num_splits;
  const int64_t lines = problem.batch * problem.num_heads * problem.seqlen_q, line = int64_t{blockIdx.x} * ROWS + threadIdx.x / 32;
  if (line >= lines) return;
  const float* const partial_lse = arguments.partial_lse + line;                       // (num_splits,), `lines` apart
  const float* const partial_out = arguments.partial_out + line * problem.head_dim_v;  // (num_splits, Dv)

  float largest = -kInfinity;
  for (int split = lane; split < num_splits; split += 32) largest = fmaxf(largest, partial_lse[split * lines]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  const float shift = largest == -kInfinity ? 0.0f : largest;  // no split saw a key
  const auto weight = [&](int split) { return ptx::ex2((partial_lse[split * lines] - shift) * kLog2E); };
  float sum = 0.0f;
  for (int split = lane; split < num_splits; split += 32) sum += weight(split);
  sum = sum_of_lanes(sum);
  const float reciprocal = sum != 0.0f ? ptx::rcp(sum) : 0.0f;
  if (lane == 0) problem.lse[line] = sum != 0.0f ? shift + ptx::lg2(sum) * kLn2 : -kInfinity;

  const int64_t row = line % problem.seqlen_q, head = line / problem.seqlen_q % problem.num_heads;
  const int64_t batch = line / problem.seqlen_q / problem.num_heads;
  auto* const out = static_cast<uint16_t*>(problem.out.data) + batch * problem.out.batch + head * problem.out.head + row * problem.out.row;
  for (int column = 4 * lane; column < problem.head_dim_v; column += 4 * 32) {
    float4 sums = {};
#pragma unroll 4
    for (int split = 0; split < num_splits; ++split) {
      const float factor = weight(split);
      const float4 terms = *reinterpret_cast<const float4*>(partial_out + split * lines * problem.head_dim_v + column);
      sums.x = fmaf(terms.x, factor, sums.x);
      sums.y = fmaf(terms.y, factor, sums.y);
      sums.z = fmaf(terms.z, factor, sums.z);
      sums.w = fmaf(terms.w, factor, sums.w);
    }
    *reinterpret_cast<uint2*>(out + column) = {ptx::pack<DTYPE>(sums.x * reciprocal, sums.y * reciprocal),
                                               ptx::pack<DTYPE>(sums.z * reciprocal, sums.w * reciprocal)};
  }
}

}  // namespace fused_attention::cuda
