// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "family.h"

namespace fused_attention::cuda {
namespace {

void check_pointer(const char* name, const StridedTensor& tensor, int64_t elements) {
  if (elements != 0 && tensor.data == nullptr) throw std::invalid_argument(std::string(name) + " has no memory");
  const int64_t bits = reinterpret_cast<intptr_t>(tensor.data) | 2 * (tensor.batch | tensor.head | tensor.row);
  if (bits % 16 != 0) throw std::invalid_argument(std::string(name) + " must have an address and strides that are multiples of 16 bytes");
}

// What unsupported_reasons in Python has looked at already: nothing is launched on unchecked pointers.
void check(const AttentionProblem& problem) {
  if (problem.dtype == Dtype::float32) throw std::invalid_argument("the CUDA kernels take bfloat16 and float16");
  if (problem.head_dim_qk % 8 != 0 || problem.head_dim_v % 8 != 0) throw std::invalid_argument("head_dim must be divisible by 8");
  if (!(problem.softmax_scale > 0) || !std::isfinite(problem.softmax_scale)) throw std::invalid_argument("scale must be finite and > 0");
  if (problem.num_heads_kv <= 0 || problem.num_heads % problem.num_heads_kv != 0) {
    throw std::invalid_argument("the heads of query must be a multiple of those of key");
  }
  if (std::max(problem.seqlen_q, problem.seqlen_k) + std::abs(int64_t{problem.diagonal}) > kUnlimited) {
    throw std::invalid_argument("sequences may have 2^30 queries and keys at most, less the diagonal's distance from their starts");
  }
  const bool packed = problem.cu_seqlens_q != nullptr;
  if (packed != (problem.cu_seqlens_k != nullptr)) throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k come together");
  const int64_t keys = packed ? problem.num_tokens_k : problem.seqlen_k;
  check_pointer("query", problem.query, packed ? problem.num_tokens_q : 1);
  check_pointer("key", problem.key, keys);
  check_pointer("value", problem.value, keys);
  if (problem.out.data == nullptr || problem.lse == nullptr) throw std::invalid_argument("out and lse must have memory");
  const bool draws = problem.dropout_threshold > 0;
  if (draws && (problem.dropout_threshold >= 65536 || problem.rng_state == nullptr)) {
    throw std::invalid_argument("dropout needs a threshold below 65536 and rng_state");
  }
}

// The first family that runs on the device and covers the call.
template <class Covers>
const Family& first_family(const DeviceLimits& limits, Covers covers) {
  for (int i = 0; i < kNumFamilies; ++i) {
    const Family& family = *kFamilies[i];
    if (runs_on(family.number, limits.compute_capability) && covers(family)) return family;
  }
  const int capability = limits.compute_capability;
  throw std::runtime_error("the CUDA kernels need compute capability 8.0, this GPU has " + std::to_string(capability / 10) + "." +
                           std::to_string(capability % 10));
}

}  // namespace

Plan plan_forward(const AttentionProblem& problem, const DeviceLimits& limits, void* workspace) {
  if (problem.batch == 0 || problem.num_heads == 0 || problem.seqlen_q == 0) return {};
  check(problem);
  const Family& family = first_family(limits, [&](const Family& candidate) { return candidate.covers_forward(problem, limits); });
  Planner planner(family.number, limits, workspace);
  family.plan_forward(planner, problem);
  return planner.finish();
}

Plan plan_backward(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits, void* workspace) {
  if (problem.batch == 0 || problem.num_heads == 0) return {};
  check(problem);
  const bool packed = problem.cu_seqlens_q != nullptr;
  const int64_t rows = packed ? problem.num_tokens_q : problem.seqlen_q, keys = packed ? problem.num_tokens_k : problem.seqlen_k;
  check_pointer("dout", problem.dout, rows);
  check_pointer("dquery", problem.dquery, rows);
  check_pointer("dkey", problem.dkey, keys);
  check_pointer("dvalue", problem.dvalue, keys);
  const Family& family = first_family(limits, [&](const Family& candidate) { return candidate.covers_backward(problem, side, limits); });
  Planner planner(family.number, limits, workspace);
  family.plan_backward(planner, problem, side);
  return planner.finish();
}

}  // namespace fused_attention::cuda
