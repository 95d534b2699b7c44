// SPDX-License-Identifier: Apache-2.0
// Which kernels run a problem on a GPU, over which grids, with which arguments: plain arithmetic that needs no GPU.
#pragma once
#include <cstddef>
#include <vector>

#include "backward_arguments.h"
#include "images.h"
#include "mask_arguments.h"

namespace fused_attention::cuda {

struct DeviceLimits {
  int compute_capability = 0;  // times ten
  int multiprocessors = 0;
  int shared_bytes = 0;  // dynamic shared memory that a block may ask for
};

struct Launch {  // one-dimensional, with its arguments by value
  const Image* image = nullptr;
  uint32_t blocks = 0, threads = 0, shared_bytes = 0, argument_bytes = 0;
  alignas(16) unsigned char arguments[std::max(sizeof(OnePassArguments), sizeof(MaskArguments))];
};

struct Plan {
  size_t workspace_bytes = 0;    // of device memory, 16-byte aligned, need not be cleared
  std::vector<Launch> launches;  // in order; a plan that needs a workspace must not be launched without one
};

// Whether to use the single-tile kernels where possible; returns the previous setting. For tests and measurements; it changes the workspace
// that a problem needs.
bool set_single_tile_kernels(bool used);

// workspace: its address, or null to ask for its size.
// Throws std::invalid_argument for what no kernel takes, std::runtime_error where this build or this device has no kernel for it.
Plan plan_forward(const AttentionProblem& problem, const DeviceLimits& limits, void* workspace);

// two_passes: backward_query and backward_key, which are deterministic; one_pass: backward, which adds to dquery from all keys at once.
// Throws std::invalid_argument if the kernel asked for does not take the problem.
enum class BackwardKernels : int { chosen = 0, two_passes = 1, one_pass = 2 };

// A backward call's additions to an AttentionProblem that has out, lse, dout, dlse and the gradients to write; see BackwardArguments.
struct SideGradients {
  StridedTensor dattn_mask;
  int64_t mask_batches = 1, mask_heads = 1;  // of dattn_mask: B or 1 and Hq or 1
  float *row_sums = nullptr, *column_sums = nullptr, *slope_sums = nullptr;
  TileLists column_tiles;      // of a PreparedMask
  bool deterministic = false;  // the same bits in every run
  BackwardKernels kernels = BackwardKernels::chosen;
};

Plan plan_backward(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits, void* workspace);

}  // namespace fused_attention::cuda
