// SPDX-License-Identifier: Apache-2.0
// Python bindings: raw addresses and strides in, an AttentionProblem out. Nothing here knows torch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace fused_attention;

namespace {

using Address = uintptr_t;
using TensorArgument = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, strides of batch, head and row in elements
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using KeyMaskArgument = std::tuple<Address, int64_t, int64_t>;  // address, strides of batch and key

StridedTensor strided(const TensorArgument& tensor) {
  const auto& [address, batch, head, row] = tensor;
  return {reinterpret_cast<void*>(address), batch, head, row};
}

template <class Enum>
Enum checked(const char* name, int value) {
  if (value < 0 || value > 2) throw std::invalid_argument(std::string(name) + " must be 0, 1 or 2, is " + std::to_string(value));
  return static_cast<Enum>(value);
}

AttentionProblem make_problem(int dtype, const Shape& shape, double scale, int causal, const TensorArgument& query,
                              const TensorArgument& key, const TensorArgument& value, const TensorArgument& out, Address lse,
                              const TensorArgument& attn_mask, const KeyMaskArgument& key_mask, Address key_lengths, Address query_lengths,
                              uint32_t dropout_threshold, Address rng_state) {
  AttentionProblem problem;
  problem.dtype = checked<Dtype>("dtype", dtype);
  std::tie(problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k, problem.head_dim_qk, problem.head_dim_v) = shape;
  problem.softmax_scale = static_cast<float>(scale);
  problem.causal = checked<Causal>("causal", causal);
  problem.query = strided(query);
  problem.key = strided(key);
  problem.value = strided(value);
  problem.out = strided(out);
  problem.lse = reinterpret_cast<float*>(lse);
  problem.attn_mask = strided(attn_mask);
  problem.key_mask = reinterpret_cast<const uint8_t*>(std::get<0>(key_mask));
  problem.key_mask_batch = std::get<1>(key_mask);
  problem.key_mask_key = std::get<2>(key_mask);
  problem.key_lengths = reinterpret_cast<const int32_t*>(key_lengths);
  problem.query_lengths = reinterpret_cast<const int32_t*>(query_lengths);
  problem.dropout_threshold = dropout_threshold;
  problem.rng_state = reinterpret_cast<const int64_t*>(rng_state);
  return problem;
}

void cpu_forward(int num_threads, int dtype, const Shape& shape, double scale, int causal, const TensorArgument& query,
                 const TensorArgument& key, const TensorArgument& value, const TensorArgument& out, Address lse,
                 const TensorArgument& attn_mask, const KeyMaskArgument& key_mask, Address key_lengths, Address query_lengths,
                 uint32_t dropout_threshold, Address rng_state) {
  const AttentionProblem problem = make_problem(dtype, shape, scale, causal, query, key, value, out, lse, attn_mask, key_mask, key_lengths,
                                                query_lengths, dropout_threshold, rng_state);
  py::gil_scoped_release released;
  cpu::forward(problem, num_threads);
}

void cpu_backward(int num_threads, int dtype, const Shape& shape, double scale, int causal, const TensorArgument& query,
                  const TensorArgument& key, const TensorArgument& value, const TensorArgument& out, Address lse,
                  const TensorArgument& attn_mask, const KeyMaskArgument& key_mask, Address key_lengths, Address query_lengths,
                  uint32_t dropout_threshold, Address rng_state, const TensorArgument& dout, Address dlse, const TensorArgument& dquery,
                  const TensorArgument& dkey, const TensorArgument& dvalue) {
  AttentionProblem problem = make_problem(dtype, shape, scale, causal, query, key, value, out, lse, attn_mask, key_mask, key_lengths,
                                          query_lengths, dropout_threshold, rng_state);
  problem.dout = strided(dout);
  problem.dlse = reinterpret_cast<const float*>(dlse);
  problem.dquery = strided(dquery);
  problem.dkey = strided(dkey);
  problem.dvalue = strided(dvalue);
  py::gil_scoped_release released;
  cpu::backward(problem, num_threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native attention kernels. Import torch first, so that both share one OpenMP runtime.";
  module.def("cpu_forward", &cpu_forward, "Writes out and lse; see kernels/native.py for the arguments.");
  module.def("cpu_backward", &cpu_backward, "Writes dquery, dkey and dvalue; the arguments of cpu_forward, then dout, dlse and the three.");
  module.def(
      "cpu_isa", [] { return cpu::selected_table().name; }, "The instruction set in use; FUSED_ATTENTION_CPU_ISA forces a lower one.");
  module.def(
      "cpu_isas",
      [] {
        py::list names;
        for (const cpu::KernelTable* table : cpu::available_tables()) names.append(table->name);
        return names;
      },
      "Every instruction set that this machine can run, best first.");
}
