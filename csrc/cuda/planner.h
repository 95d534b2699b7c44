// SPDX-License-Identifier: Apache-2.0
// What a family needs to plan its launches: images that the device runs, workspace, and the pre-pass over masks.
#pragma once
#include <cstring>
#include <utility>

#include "plan.h"

namespace fused_attention::cuda {

inline int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

FeatureClass feature_class(const AttentionProblem& problem);

// All of it but tiles and units.
void fill(ForwardArguments& arguments, const AttentionProblem& problem);

class Planner {
 public:
  // workspace: as plan_forward takes it.
  Planner(int family, const DeviceLimits& device_limits, void* workspace)
      : limits(device_limits), family_(family), workspace_(reinterpret_cast<uintptr_t>(workspace)) {}

  const DeviceLimits limits;

  // The family's smallest instance that fits the head dims and the device. If there is none: null, or if `required` an exception that says
  // why.
  const Image* find(Pass pass, FeatureClass wanted, const AttentionProblem& problem, bool required) const;

  // A helper of any family that the device runs.
  const Image& named(const char* name) const;

  template <class T>
  T* take(int64_t bytes) {
    T* const piece = reinterpret_cast<T*>(workspace_ + plan_.workspace_bytes);
    plan_.workspace_bytes += static_cast<size_t>(ceil_div(bytes, kPieceAlignment) * kPieceAlignment);
    return piece;
  }

  template <class Arguments>
  void launch(const Image& image, int64_t blocks, int threads, int shared_bytes, const Arguments& arguments) {
    if (blocks == 0) return;
    check_grid(image, blocks);
    Launch& launch = plan_.launches.emplace_back();
    launch.image = &image;
    launch.blocks = static_cast<uint32_t>(blocks);
    launch.threads = static_cast<uint32_t>(threads);
    launch.shared_bytes = static_cast<uint32_t>(shared_bytes);
    launch.argument_bytes = sizeof(Arguments);
    std::memcpy(launch.arguments, &arguments, sizeof(Arguments));
  }
  template <class Arguments>
  void launch(const Image& image, int64_t blocks, const Arguments& arguments) {
    launch(image, blocks, image.num_threads, image.shared_bytes, arguments);
  }

  // What tells full, mixed and empty tiles of block_m x 64 scores apart, where loop bounds do not; leaves its result in `arguments`, and
  // that of a bool mask by columns in column_tiles where that is asked for.
  void plan_mask_tiles(int block_m, ForwardArguments& arguments, TileLists* column_tiles = nullptr);

  Plan finish() { return std::move(plan_); }

 private:
  static constexpr int64_t kPieceAlignment = 256;  // as device allocations have

  static void check_grid(const Image& image, int64_t blocks);

  const int family_;
  const uintptr_t workspace_;
  Plan plan_;
};

}  // namespace fused_attention::cuda
