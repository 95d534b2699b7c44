// SPDX-License-Identifier: Apache-2.0
// A bool attn_mask, one byte per score, as words of bits.
#pragma once
#include "mask.cuh"

namespace fused_attention::cuda {

// 16 bytes -> 16 bits, 1 where a byte is not 0.
__device__ inline uint32_t pack_bytes(uint4 bytes) {
  const auto pack_four = [](uint32_t four) {
    const uint32_t set = (((four & 0x7f7f7f7f) + 0x7f7f7f7f) | four) >> 7 & 0x01010101;
    return set * 0x01020408 >> 24 & 0xf;  // bit 8 k moves to bit 24 + k
  };
  return pack_four(bytes.x) | pack_four(bytes.y) << 4 | pack_four(bytes.z) << 8 | pack_four(bytes.w) << 12;
}

// Bit b: whether this thread's row may attend to key first_key + b, for the bits set in `wanted`; if none is, nothing is read. The whole
// warp calls it, each lane with its own row and the same keys. row_offset: of this thread's row in the mask.
__device__ inline uint32_t attn_mask_bits(const AttentionProblem& problem, int64_t row_offset, int first_key, uint32_t wanted) {
  const auto* const data = static_cast<const uint8_t*>(problem.attn_mask.data);
  const int64_t alignment =
      reinterpret_cast<intptr_t>(problem.attn_mask.data) | problem.attn_mask.batch | problem.attn_mask.head | problem.attn_mask.row;
  if (problem.attn_mask_key == 1 && alignment % 16 == 0 && first_key + 32 <= problem.seqlen_k) {
    if (wanted == 0) return 0;
    const uint4* halves = reinterpret_cast<const uint4*>(data + row_offset + first_key);
    const uint4 first = halves[0], second = halves[1];
    return (pack_bytes(first) | pack_bytes(second) << 16) & wanted;
  }
  const int lane = threadIdx.x % 32;
  uint32_t bits = 0;
#pragma unroll 8
  for (int row = 0; row < 32; ++row) {
    const uint8_t* const mask = data + __shfl_sync(kWholeWarp, row_offset, row);
    const bool is_wanted = __shfl_sync(kWholeWarp, wanted, row) >> lane & 1;
    const uint32_t of_row = __ballot_sync(kWholeWarp, is_wanted && mask[(first_key + lane) * problem.attn_mask_key] != 0);
    if (lane == row) bits = of_row;
  }
  return bits;
}

}  // namespace fused_attention::cuda
