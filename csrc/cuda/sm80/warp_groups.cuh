// SPDX-License-Identifier: Apache-2.0
// For the single-tile kernels: the groups of warps that a block is split into, and which keys a row may attend to, as words of 32 bits.
#pragma once
#include "../bool_mask.cuh"
#include "../row_block.cuh"

namespace fused_attention::cuda::sm80 {

// The warps of a block that share one unit of work (SingleTileUnits). They wait for each other, never for another group.
struct WarpGroup {
  int number, warp, num_warps;  // index of the group in its block, of this warp in its group
  uint32_t unit;
  bool has_work;

  // thread: threadIdx.x, or ptx::again of it.
  FA_DEVICE explicit WarpGroup(const SingleTileUnits& units, uint32_t thread = threadIdx.x) : num_warps(units.warps) {
    const uint32_t warps = static_cast<uint32_t>(num_warps), block_warp = thread / 32;
    number = static_cast<int>(block_warp / warps);
    warp = static_cast<int>(block_warp % warps);
    unit = blockIdx.x * (blockDim.x / 32 / warps) + number;
    has_work = unit < units.count;
  }

  FA_DEVICE void sync() const { ptx::barrier_sync(number, 32 * num_warps); }
};

// Bit b: whether a row may attend to key first_key + b. The whole warp calls it with the same keys, each lane with its own row; a row that
// is not present may attend to none.
//   existing: which of the keys exist
//   BY_POSITION: nothing else masks
template <bool BY_POSITION>
FA_DEVICE uint32_t allowed_keys(const ScoreMask& mask, int row, int first_key, uint32_t existing) {
  const AttentionProblem& problem = mask.problem;
  const bool present = row < mask.sequence.rows_present;
  uint32_t allowed = present ? existing & bits_of(mask.sequence.keys_of(row), first_key) : 0;
  if constexpr (!BY_POSITION) {
    const uint32_t* const bits = of_head(problem.mask_bits.data, problem.mask_bits.batch, mask.batch, problem.mask_bits.head, mask.head);
    if (bits != nullptr) {  // for rows that are present, they are the whole mask
      allowed = present && existing != 0 ? existing & bits[row * problem.mask_bits.line + first_key / kKeysPerWord] : 0;
    } else if (problem.attn_mask.data != nullptr && problem.attn_mask_dtype == MaskDtype::boolean) {
      const int64_t offset = mask.batch * problem.attn_mask.batch + mask.head * problem.attn_mask.head + row * problem.attn_mask.row;
      allowed = attn_mask_bits(problem, offset, first_key, allowed);
    }
  }
  return allowed;
}

}  // namespace fused_attention::cuda::sm80
