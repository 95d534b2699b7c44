// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set. Each isa_*.cpp fills one table; dispatch.cpp picks a table at run time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace fused_attention::cpu {

// A kernel splits its problem into independent tasks; a thread runs a contiguous range of them with its own scratch memory.
struct Plan {
  int64_t num_tasks;
  int64_t task_size;        // size of a forward task: query rows of a head, or key heads if there are few rows
  size_t scratch_bytes;     // per thread, 64-byte aligned
  int64_t key_parts = 1;    // tasks that share the keys of a forward task with few rows
  size_t shared_bytes = 0;  // of all threads, zero at the start
  char* shared = nullptr;   // set by dispatch.cpp
};

// How many parts the backward sums over the keys of a sequence in, each by itself and then one after the other. It depends on nothing but
// the sequence, so that results do not depend on whether one task computes the parts or each is a task.
static inline int64_t key_parts(int64_t seqlen_k) {
  constexpr int64_t kTile = 64, kLeastTiles = 2, kMostParts = 4;
  const int64_t parts = (seqlen_k + kTile - 1) / kTile / kLeastTiles;
  return parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
}

// The second-level cache of a core, which decides how much is packed at once. FUSED_ATTENTION_CPU_L2_KIB, read on every call, is for tests.
int64_t l2_bytes();

struct Kernel {
  Plan (*plan)(const AttentionProblem&, int num_threads);
  void (*run)(const AttentionProblem&, const Plan&, int64_t first_task, int64_t last_task, char* scratch);
};

// out (rows, out_features) = x (rows, in_features) * weight (out_features, in_features)^T + bias (out_features,) or 0
struct Linear {
  static constexpr int64_t kMaxRows = 64;

  const float *x, *weight, *bias;
  float* out;
  int64_t rows, in_features, out_features;
  int64_t x_row, weight_row;  // elements from one row to the next
};

struct KernelTable {
  const char* name;
  Kernel forward[3], backward[3], weights[3];  // indexed by Dtype
  Kernel forward_with_weights;                 // float32
  Kernel quantized_forward[3];                 // of few query rows, indexed by CacheDtype
  void (*linear)(const Linear&, int64_t first_column, int64_t last_column);
  // For float32 problems with bf16x3, where that is faster; null elsewhere.
  Kernel forward_bf16x3 = {}, backward_bf16x3 = {};
};

extern const KernelTable kBaseKernels, kAvx2Kernels, kAvx512Kernels;  // x86-64 has all three, other machines only kBaseKernels
// bfloat16 only; for the rest, these machines use kAvx512Kernels.
extern const Kernel kAmxForward, kAmxBackward, kAvx512Bf16Forward, kAvx512Bf16Backward;
extern const Kernel kAmxForwardBf16x3, kAmxBackwardBf16x3;  // float32

bool amx_available();          // isa_amx.cpp: whether the processor has bf16 tiles and Linux lets this process use them; checked once
bool avx512_bf16_available();  // isa_avx512_bf16.cpp

}  // namespace fused_attention::cpu
