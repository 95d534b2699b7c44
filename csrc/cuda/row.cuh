// SPDX-License-Identifier: Apache-2.0
// What an entry file is compiled for: one row of instances/manifest.py, whose values the build passes as macros.
#pragma once
#include "forward_arguments.h"

namespace fused_attention::cuda {

struct Row {
  static constexpr Dtype kDtype = Dtype::ROW_DTYPE;
  static constexpr FeatureClass kClass = FeatureClass::ROW_FEATURE_CLASS;
  static constexpr bool kPlain = kClass == FeatureClass::plain, kBias = kClass == FeatureClass::bias, kDropout = ROW_DROPOUT;
  static constexpr int kHeadDimQk = ROW_HEAD_DIM_QK, kHeadDimV = ROW_HEAD_DIM_V;
  static constexpr int kBlockM = ROW_BLOCK_M, kBlockN = ROW_BLOCK_N, kWarps = ROW_NUM_WARPS, kStages = ROW_STAGES;
  static constexpr int kHeldQk = ROW_HELD_QK, kHeldV = ROW_HELD_V;
  static constexpr int kThreads = 32 * kWarps, kBlocksPerSm = ROW_BLOCKS_PER_SM;
  static constexpr int kSharedBytes = ROW_SHARED_BYTES;
};

}  // namespace fused_attention::cuda
