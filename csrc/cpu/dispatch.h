// SPDX-License-Identifier: Apache-2.0
// Runs a problem on the best kernels of this machine, on torch's OpenMP threads.
#pragma once
#include <vector>

#include "kernel_table.h"

namespace fused_attention::cpu {

// Every table that this machine can run, best first.
const std::vector<const KernelTable*>& available_tables();

// The first of them, or the one named by the environment variable FUSED_ATTENTION_CPU_ISA, which is read at every call.
// Throws std::runtime_error when that name is unknown or not available here.
const KernelTable& selected_table();

// num_threads <= 1 runs in the calling thread, without a parallel region. Throws std::bad_alloc when scratch memory runs out.
void forward(const AttentionProblem& problem, int num_threads);
void backward(const AttentionProblem& problem, int num_threads);
void weights(const AttentionProblem& problem, int num_threads);

}  // namespace fused_attention::cpu
