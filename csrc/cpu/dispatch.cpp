// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <omp.h>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace fused_attention::cpu {
namespace {

constexpr const char *kIsaVariable = "FUSED_ATTENTION_CPU_ISA", *kL2Variable = "FUSED_ATTENTION_CPU_L2_KIB";
constexpr int64_t kUsualL2 = 1 << 20;  // where the system does not say
constexpr size_t kPage = 4096;
// Contiguous ranges of tasks per thread: enough to balance uneven tasks or a busy core, few enough that a thread rarely starts on rows
// that nothing has prefetched. A thread's ranges are adjacent, so two threads seldom touch the same page of the results at once. A thread
// that finishes its own ranges takes over ranges of the others.
constexpr int64_t kRangesPerThread = 4;
// Below this many multiply-adds, waking other threads costs more than it saves.
constexpr double kSerialWork = 1 << 18;
constexpr int64_t kColumnBlock = 16;  // of a linear layer's result, a cache line, that one thread writes

// A fork copies the forking thread's OpenMP pool but not the pool's threads, and the child's first parallel region, torch's too, would wait
// for them forever. So they end before a fork, and the next region of either process starts new ones.
[[maybe_unused]] const int kAtFork = pthread_atfork([] { omp_pause_resource_all(omp_pause_hard); }, nullptr, nullptr);

#if defined(__x86_64__)
// The AVX-512 kernels with others for bfloat16.
KernelTable with_bfloat16(const char* name, const Kernel& forward, const Kernel& backward) {
  KernelTable kernels = kAvx512Kernels;
  kernels.name = name;
  kernels.forward[static_cast<int>(Dtype::bfloat16)] = forward;
  kernels.backward[static_cast<int>(Dtype::bfloat16)] = backward;
  return kernels;
}

KernelTable amx_table() {
  KernelTable kernels = with_bfloat16("amx", kAmxForward, kAmxBackward);
  kernels.forward_bf16x3 = kAmxForwardBf16x3;
  kernels.backward_bf16x3 = kAmxBackwardBf16x3;
  return kernels;
}
#endif

std::vector<const KernelTable*> find_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  static const KernelTable amx = amx_table(), bf16 = with_bfloat16("avx512_bf16", kAvx512Bf16Forward, kAvx512Bf16Backward);
  // VDPBF16PS, twice the work of VFMADD231PS, runs at its rate on AMD's processors, but at a quarter of it on Intel's.
  const bool avx512_bf16 = avx512 && avx512_bf16_available(), fast_dot_products = __builtin_cpu_is("amd");
  if (avx512 && amx_available()) tables.push_back(&amx);
  if (avx512_bf16 && fast_dot_products) tables.push_back(&bf16);
  if (avx512) tables.push_back(&kAvx512Kernels);
  if (avx512_bf16 && !fast_dot_products) tables.push_back(&bf16);
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

// The ranges of one thread, on its own cache line.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// The C library always maps fresh memory for allocations of this size.
constexpr int64_t kAlwaysMapped = 32 << 20, kHugePage = 2 << 20;

// Asks for huge pages for a freshly allocated result: thousands fewer page faults, and fewer TLB misses on the kernels' long strides.
// Linux is free to ignore this.
void advise_huge_pages(const AttentionProblem& problem, const StridedTensor& result, int64_t num_heads, int64_t rows, int64_t head_dim) {
#if defined(MADV_HUGEPAGE)
  const int64_t elements = (problem.batch - 1) * result.batch + (num_heads - 1) * result.head + (rows - 1) * result.row + head_dim,
                bytes = elements * (problem.dtype == Dtype::float32 ? 4 : 2);
  if (!result.data || bytes < kAlwaysMapped) return;
  const auto begin = reinterpret_cast<uintptr_t>(result.data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void run(const Kernel& kernel, const AttentionProblem& problem, int num_threads) {
  static thread_local Scratch scratch;
  Plan plan = kernel.plan(problem, num_threads);
  if (plan.shared_bytes > 0) {
    static thread_local Scratch shared;
    plan.shared = shared.at_least(plan.shared_bytes);
    std::memset(plan.shared, 0, plan.shared_bytes);
  }
  const double work = static_cast<double>(problem.batch) * static_cast<double>(problem.num_heads) * static_cast<double>(problem.seqlen_q) *
                      static_cast<double>(problem.seqlen_k) * static_cast<double>(problem.head_dim_qk + problem.head_dim_v);
  if (num_threads <= 1 || plan.num_tasks <= 1 || work < kSerialWork) {
    if (plan.num_tasks > 0) kernel.run(problem, plan, 0, plan.num_tasks, scratch.at_least(plan.scratch_bytes));
    return;
  }
  const int64_t num_shares = std::min<int64_t>(num_threads, plan.num_tasks),
                num_ranges = std::min(plan.num_tasks, kRangesPerThread * num_shares);
  std::vector<Share> shares(static_cast<size_t>(num_shares));
  for (int64_t n = 0; n < num_shares; ++n) {
    shares[n].next = num_ranges * n / num_shares;
    shares[n].end = num_ranges * (n + 1) / num_shares;
  }
  std::exception_ptr failure;  // an exception must not leave the parallel region
#pragma omp parallel num_threads(static_cast<int>(num_shares))
  {
    try {
      char* memory = scratch.at_least(plan.scratch_bytes);
      for (int64_t n = 0; n < num_shares; ++n) {
        Share& share = shares[(omp_get_thread_num() + n) % num_shares];
        for (int64_t range; (range = share.next.fetch_add(1)) < share.end;)
          kernel.run(problem, plan, plan.num_tasks * range / num_ranges, plan.num_tasks * (range + 1) / num_ranges, memory);
      }
    } catch (...) {
#pragma omp critical(fused_attention_failure)
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

int64_t l2_of_this_machine() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes > 0 ? bytes : kUsualL2;
#else
  return kUsualL2;
#endif
}

const Kernel& forward_kernel(const KernelTable& table, const AttentionProblem& problem) {
  if (problem.cache_dtype != CacheDtype::none) return table.quantized_forward[static_cast<int>(problem.cache_dtype)];
  return problem.bf16x3 && table.forward_bf16x3.run ? table.forward_bf16x3 : table.forward[static_cast<int>(problem.dtype)];
}

const Kernel& backward_kernel(const KernelTable& table, const AttentionProblem& problem) {
  return problem.bf16x3 && table.backward_bf16x3.run ? table.backward_bf16x3 : table.backward[static_cast<int>(problem.dtype)];
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = l2_of_this_machine();
  const char* kib = std::getenv(kL2Variable);
  return kib && *kib ? std::max(std::atoll(kib), 64LL) << 10 : bytes;
}

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

bool has_bf16x3() {
  const auto& tables = available_tables();
  return std::any_of(tables.begin(), tables.end(), [](const KernelTable* table) { return table->forward_bf16x3.run; });
}

void forward(const AttentionProblem& problem, int num_threads) {
  advise_huge_pages(problem, problem.out, problem.num_heads, problem.seqlen_q, problem.head_dim_v);
  run(forward_kernel(selected_table(), problem), problem, num_threads);
}

void backward(const AttentionProblem& problem, int num_threads) {
  advise_huge_pages(problem, problem.dquery, problem.num_heads, problem.seqlen_q, problem.head_dim_qk);
  advise_huge_pages(problem, problem.dkey, problem.num_heads_kv, problem.seqlen_k, problem.head_dim_qk);
  advise_huge_pages(problem, problem.dvalue, problem.num_heads_kv, problem.seqlen_k, problem.head_dim_v);
  run(backward_kernel(selected_table(), problem), problem, num_threads);
}

void weights(const AttentionProblem& problem, int num_threads) {
  run(selected_table().weights[static_cast<int>(problem.dtype)], problem, num_threads);
}

void forward_with_weights(const AttentionProblem& problem, int num_threads) {
  advise_huge_pages(problem, problem.out, problem.num_heads, problem.seqlen_q, problem.head_dim_v);
  run(selected_table().forward_with_weights, problem, num_threads);
}

void linear(const Linear& linear, int num_threads) {
  if (linear.rows <= 0) return;
  const auto run_columns = selected_table().linear;
  const int64_t num_blocks = (linear.out_features + kColumnBlock - 1) / kColumnBlock;
  const double work = static_cast<double>(linear.rows) * static_cast<double>(linear.in_features) * static_cast<double>(linear.out_features);
  if (num_threads <= 1 || num_blocks <= 1 || work < kSerialWork) return run_columns(linear, 0, linear.out_features);
  const int64_t num_shares = std::min<int64_t>(num_threads, num_blocks);
#pragma omp parallel num_threads(static_cast<int>(num_shares))
  // OpenMP may give fewer threads than were asked for.
  for (int64_t share = omp_get_thread_num(); share < num_shares; share += omp_get_num_threads())
    run_columns(linear, num_blocks * share / num_shares * kColumnBlock,
                std::min(num_blocks * (share + 1) / num_shares * kColumnBlock, linear.out_features));
}

}  // namespace fused_attention::cpu
