// SPDX-License-Identifier: Apache-2.0
// A family of kernels: one folder, for the GPUs that have its instructions. To add one: a folder with a Family in its plan.cpp and an entry
// file per kernel, rows in instances/manifest.py, and a line in families.cpp.
#pragma once
#include "planner.h"

namespace fused_attention::cuda {

struct Family {
  int number;  // Image::family

  // Whether it takes a call that plan.cpp has checked, on a GPU that it runs on. The portable family, which is asked last, takes every
  // call: its plan throws if its kernels do not cover it.
  bool (*covers_forward)(const AttentionProblem& problem, const DeviceLimits& limits);
  bool (*covers_backward)(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits);

  // For what it covers.
  void (*plan_forward)(Planner& planner, const AttentionProblem& problem);
  void (*plan_backward)(Planner& planner, const AttentionProblem& problem, const SideGradients& side);
};

extern const Family* const kFamilies[];  // in the order they are asked; the portable one is last
extern const int kNumFamilies;

}  // namespace fused_attention::cuda
