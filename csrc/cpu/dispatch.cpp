// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace fused_attention::cpu {
namespace {

constexpr const char* kIsaVariable = "FUSED_ATTENTION_CPU_ISA";
constexpr size_t kPage = 4096;
// Contiguous ranges of tasks per thread: enough to even out tasks of unequal cost or a busy core, few enough that a thread
// rarely starts on rows that nothing has prefetched.
constexpr int64_t kRangesPerThread = 4;
// Multiply-adds below which waking other threads costs more than it saves.
constexpr double kSerialWork = 1 << 18;

std::vector<const KernelTable*> find_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && amx_available()) tables.push_back(&kAmxKernels);
  if (avx512) tables.push_back(&kAvx512Kernels);
  if (avx2) tables.push_back(&kAvx2Kernels);
#endif
  tables.push_back(&kBaseKernels);
  return tables;
}

// Scratch memory of one thread, kept between calls.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
      memory_ = static_cast<char*>(std::aligned_alloc(kPage, rounded));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

void run(const Kernel& kernel, const AttentionProblem& problem, int num_threads) {
  static thread_local Scratch scratch;
  const Plan plan = kernel.plan(problem, num_threads);
  const double work = static_cast<double>(problem.batch) * static_cast<double>(problem.num_heads) * static_cast<double>(problem.seqlen_q) *
                      static_cast<double>(problem.seqlen_k) * static_cast<double>(problem.head_dim_qk + problem.head_dim_v);
  if (num_threads <= 1 || plan.num_tasks <= 1 || work < kSerialWork) {
    if (plan.num_tasks > 0) kernel.run(problem, plan, 0, plan.num_tasks, scratch.at_least(plan.scratch_bytes));
    return;
  }
  const int64_t num_ranges = std::min(plan.num_tasks, kRangesPerThread * num_threads);
  std::atomic<int64_t> next_range{0};
  std::exception_ptr failure;  // an exception must not leave the parallel region
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(num_threads, plan.num_tasks)))
  {
    try {
      char* memory = scratch.at_least(plan.scratch_bytes);
      for (int64_t range; (range = next_range.fetch_add(1)) < num_ranges;)
        kernel.run(problem, plan, plan.num_tasks * range / num_ranges, plan.num_tasks * (range + 1) / num_ranges, memory);
    } catch (...) {
#pragma omp critical(fused_attention_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

const std::vector<const KernelTable*>& available_tables() {
  static const std::vector<const KernelTable*> tables = find_tables();
  return tables;
}

const KernelTable& selected_table() {
  const auto& tables = available_tables();
  const char* wanted = std::getenv(kIsaVariable);
  if (!wanted || !*wanted) return *tables.front();
  std::string offered;
  for (const KernelTable* table : tables) {
    if (std::string(wanted) == table->name) return *table;
    offered += (offered.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error(std::string(kIsaVariable) + "=" + wanted + " is not an instruction set of this machine, which offers " +
                           offered);
}

void forward(const AttentionProblem& problem, int num_threads) {
  run(selected_table().forward[static_cast<int>(problem.dtype)], problem, num_threads);
}

void backward(const AttentionProblem& problem, int num_threads) {
  run(selected_table().backward[static_cast<int>(problem.dtype)], problem, num_threads);
}

void weights(const AttentionProblem& problem, int num_threads) {
  run(selected_table().weights[static_cast<int>(problem.dtype)], problem, num_threads);
}

}  // namespace fused_attention::cpu
