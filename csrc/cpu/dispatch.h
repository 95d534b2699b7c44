// SPDX-License-Identifier: Apache-2.0
// Runs a problem on the best kernels of this machine, on torch's OpenMP threads.
#pragma once
#include <vector>

#include "kernel_table.h"

namespace fused_attention::cpu {

// Every table this machine can run, best first.
const std::vector<const KernelTable*>& available_tables();

// The best table, or the one named by the environment variable FUSED_ATTENTION_CPU_ISA, which is read on every call.
// Throws std::runtime_error if that name is unknown or not available on this machine.
const KernelTable& selected_table();

// Whether some table has kernels for float32 problems with bf16x3; on others, they run as without it.
bool has_bf16x3();

// num_threads <= 1 runs on the calling thread, without a parallel region. Throws std::bad_alloc if scratch memory cannot be allocated.
void forward(const AttentionProblem& problem, int num_threads);
void backward(const AttentionProblem& problem, int num_threads);
void weights(const AttentionProblem& problem, int num_threads);
void forward_with_weights(const AttentionProblem& problem, int num_threads);  // float32, at most 512 keys
void linear(const Linear& linear, int num_threads);

}  // namespace fused_attention::cpu
