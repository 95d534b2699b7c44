// SPDX-License-Identifier: Apache-2.0
// A family of kernels: what one folder holds, for the GPUs that its instructions run on. A new one is its folder, with a Family in its
// plan.cpp and an entry file for each kernel, rows in instances/manifest.py and a line in families.cpp.
#pragma once
#include "planner.h"

namespace fused_attention::cuda {

struct Family {
  int number;  // Image::family

  // Whether it takes a call that plan.cpp has checked, on a GPU that it runs on. The portable family takes every call, because nobody is
  // asked after it: what its kernels do not cover is an exception from its plan.
  bool (*covers_forward)(const AttentionProblem& problem, const DeviceLimits& limits);
  bool (*covers_backward)(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits);

  // Of what it covers.
  void (*plan_forward)(Planner& planner, const AttentionProblem& problem);
  void (*plan_backward)(Planner& planner, const AttentionProblem& problem, const SideGradients& side);
};

extern const Family* const kFamilies[];  // in the order in which they are asked: the portable one is last
extern const int kNumFamilies;

}  // namespace fused_attention::cuda
