// SPDX-License-Identifier: Apache-2.0
// Python bindings: raw addresses and strides in, an AttentionProblem out. Nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "cuda/driver.h"

namespace py = pybind11;
using namespace fused_attention;

namespace {

using Address = uintptr_t;
using TensorArgument = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, strides of batch, head and row in elements
StridedTensor strided(const TensorArgument& tensor) {
  const auto& [address, batch, head, row] = tensor;
  return {reinterpret_cast<void*>(address), batch, head, row};
}

template <class Enum>
Enum checked(const char* name, int value) {
  if (value < 0 || value > 2) throw std::invalid_argument(std::string(name) + " must be 0, 1 or 2, is " + std::to_string(value));
  return static_cast<Enum>(value);
}

// What the forward and the backward on the CPU share, in groups as kernels/native.py makes them.
using CpuSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using CpuOptions = std::tuple<int, double, double, int, int32_t, int32_t, uint32_t>;
using CpuMask = std::tuple<TensorArgument, int64_t, int>;                          // attn_mask, its key stride, its dtype
using CpuKeyMask = std::tuple<Address, int64_t, int64_t>;                          // key_mask, strides of batch and key
using CpuRows = std::tuple<Address, Address, Address, Address, int64_t, int64_t>;  // lengths, cu_seqlens, numbers of tokens
using CpuBiases = std::tuple<std::tuple<Address, int64_t, int64_t>, Address>;      // alibi_slopes with its strides, sinks
using CpuPrepared = std::tuple<TensorArgument, TensorArgument, int32_t>;           // mask_bits, row_tiles, tiles to a line
using CpuSideTensors = std::tuple<CpuMask, CpuKeyMask, CpuRows, CpuBiases, CpuPrepared>;
using CpuArguments = std::tuple<CpuSizes, CpuOptions, TensorArgument, TensorArgument, TensorArgument, TensorArgument, Address, Address,
                                std::optional<CpuSideTensors>>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void add_side_tensors(AttentionProblem& problem, const CpuSideTensors& side_tensors) {
  const auto& [mask, key_mask, rows, biases, prepared] = side_tensors;
  problem.attn_mask = strided(std::get<0>(mask));
  problem.attn_mask_key = std::get<1>(mask);
  problem.attn_mask_dtype = static_cast<MaskDtype>(std::get<2>(mask));
  problem.key_mask = pointer<const uint8_t>(std::get<0>(key_mask));
  std::tie(std::ignore, problem.key_mask_batch, problem.key_mask_key) = key_mask;
  const auto& [key_lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, num_tokens_q, num_tokens_k] = rows;
  problem.key_lengths = pointer<const int32_t>(key_lengths);
  problem.query_lengths = pointer<const int32_t>(query_lengths);
  problem.cu_seqlens_q = pointer<const int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = pointer<const int32_t>(cu_seqlens_k);
  problem.num_tokens_q = num_tokens_q, problem.num_tokens_k = num_tokens_k;
  const auto& [slopes, sinks] = biases;
  problem.alibi_slopes = pointer<const float>(std::get<0>(slopes));
  std::tie(std::ignore, problem.alibi_slopes_batch, problem.alibi_slopes_head) = slopes;
  problem.sinks = pointer<const float>(sinks);
  const auto& [bits, tiles, num_tiles] = prepared;
  problem.mask_bits = {pointer<const uint32_t>(std::get<0>(bits)), std::get<1>(bits), std::get<2>(bits), std::get<3>(bits)};
  problem.row_tiles = {pointer<const int32_t>(std::get<0>(tiles)), std::get<1>(tiles), std::get<2>(tiles), std::get<3>(tiles), num_tiles};
}

AttentionProblem cpu_problem(const CpuArguments& arguments) {
  const auto& [sizes, options, query, key, value, out, lse, rng_state, side_tensors] = arguments;
  AttentionProblem problem;
  std::tie(problem.batch, problem.num_heads, problem.num_heads_kv, problem.seqlen_q, problem.seqlen_k, problem.head_dim_qk,
           problem.head_dim_v) = sizes;
  const auto& [dtype, scale, softcap, causal, window_left, window_right, dropout_threshold] = options;
  problem.dtype = checked<Dtype>("dtype", dtype);
  problem.softmax_scale = static_cast<float>(scale);
  problem.softcap = static_cast<float>(softcap);
  problem.causal = checked<Causal>("causal", causal);
  problem.window_left = window_left;
  problem.window_right = window_right;
  problem.dropout_threshold = dropout_threshold;
  problem.query = strided(query);
  problem.key = strided(key);
  problem.value = strided(value);
  problem.out = strided(out);
  problem.lse = pointer<float>(lse);
  problem.rng_state = pointer<const int64_t>(rng_state);
  if (side_tensors) add_side_tensors(problem, *side_tensors);
  return problem;
}

void cpu_forward(int num_threads, const CpuArguments& arguments) {
  const AttentionProblem problem = cpu_problem(arguments);
  py::gil_scoped_release released;
  cpu::forward(problem, num_threads);
}

// An AttentionProblem as bytes, for cpu_repeat.
py::bytes cpu_problem_bytes(const CpuArguments& arguments) {
  const AttentionProblem problem = cpu_problem(arguments);
  return py::bytes(reinterpret_cast<const char*>(&problem), sizeof(problem));
}

// cpu_repeat(problem, num_threads, query, key, value, out, lse, key_mask, key_lengths): cpu_forward with other addresses. Without
// pybind11's conversions, which take longer than a small kernel.
PyObject* cpu_repeat(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  AttentionProblem problem;
  if (num_arguments != 9 || !PyBytes_Check(arguments[0]) || PyBytes_GET_SIZE(arguments[0]) != sizeof(problem)) {
    PyErr_SetString(PyExc_TypeError, "cpu_repeat takes a problem, a number of threads and 7 addresses");
    return nullptr;
  }
  std::memcpy(static_cast<void*>(&problem), PyBytes_AS_STRING(arguments[0]), sizeof(problem));
  const long num_threads = PyLong_AsLong(arguments[1]);
  const auto address = [&](int number) { return PyLong_AsVoidPtr(arguments[2 + number]); };
  problem.query.data = address(0);
  problem.key.data = address(1);
  problem.value.data = address(2);
  problem.out.data = address(3);
  problem.lse = static_cast<float*>(address(4));
  problem.key_mask = static_cast<const uint8_t*>(address(5));
  problem.key_lengths = static_cast<const int32_t*>(address(6));
  if (PyErr_Occurred()) return nullptr;
  try {
    const py::gil_scoped_release released;
    cpu::forward(problem, static_cast<int>(num_threads));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef cpu_repeat_definition = {"cpu_repeat", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cpu_repeat)), METH_FASTCALL,
                                     "Writes out and lse of a problem of cpu_problem with other addresses."};

void cpu_weights(int num_threads, const CpuArguments& arguments, bool average_heads) {
  AttentionProblem problem = cpu_problem(arguments);
  problem.average_heads = average_heads;
  py::gil_scoped_release released;
  cpu::weights(problem, num_threads);
}

// dattn_mask: address, number of parts, strides of part, batch, head, row and key.
void cpu_backward(int num_threads, const CpuArguments& arguments, const TensorArgument& dout, Address dlse, const TensorArgument& dquery,
                  const TensorArgument& dkey, const TensorArgument& dvalue, int32_t num_key_splits, Address dquery_parts,
                  const std::tuple<Address, int32_t, int64_t, int64_t, int64_t, int64_t, int64_t>& dattn_mask, Address dalibi_slopes,
                  Address dsinks) {
  AttentionProblem problem = cpu_problem(arguments);
  problem.dout = strided(dout);
  problem.dlse = pointer<const float>(dlse);
  problem.dquery = strided(dquery);
  problem.dkey = strided(dkey);
  problem.dvalue = strided(dvalue);
  problem.num_key_splits = num_key_splits;
  problem.dquery_parts = pointer<float>(dquery_parts);
  problem.dattn_mask = pointer<float>(std::get<0>(dattn_mask));
  std::tie(std::ignore, problem.num_mask_parts, problem.dattn_mask_part, problem.dattn_mask_batch, problem.dattn_mask_head,
           problem.dattn_mask_row, problem.dattn_mask_key) = dattn_mask;
  problem.dalibi_slopes = pointer<float>(dalibi_slopes);
  problem.dsinks = pointer<float>(dsinks);
  py::gil_scoped_release released;
  cpu::backward(problem, num_threads);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // of batch, head and row in elements

StridedTensor unplaced(const Strides& strides) { return {nullptr, std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)}; }

// An AttentionProblem without its addresses, as bytes that Python keeps for all calls that differ in nothing else.
py::bytes cuda_problem(int dtype, const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes,
                       const std::tuple<int64_t, int64_t>& num_tokens, double scale, int causal, const std::tuple<int32_t, int32_t>& window,
                       double softcap, uint32_t dropout_threshold, const Strides& query, const Strides& key, const Strides& value,
                       const Strides& out, const Strides& attn_mask, int64_t attn_mask_key, int attn_mask_dtype,
                       const std::tuple<int64_t, int64_t>& key_mask, const std::tuple<int64_t, int64_t>& alibi_slopes,
                       const Strides& mask_bits, const Strides& row_tiles, int32_t num_tiles) {
  AttentionProblem problem;
  problem.dtype = checked<Dtype>("dtype", dtype);
  std::tie(problem.batch, problem.num_heads, problem.num_heads_kv, problem.seqlen_q, problem.seqlen_k, problem.head_dim_qk,
           problem.head_dim_v) = sizes;
  std::tie(problem.num_tokens_q, problem.num_tokens_k) = num_tokens;
  problem.softmax_scale = static_cast<float>(scale);
  problem.causal = checked<Causal>("causal", causal);
  std::tie(problem.window_left, problem.window_right) = window;
  problem.softcap = static_cast<float>(softcap);
  problem.dropout_threshold = dropout_threshold;
  problem.query = unplaced(query);
  problem.key = unplaced(key);
  problem.value = unplaced(value);
  problem.out = unplaced(out);
  problem.attn_mask = unplaced(attn_mask);
  problem.attn_mask_key = attn_mask_key;
  problem.attn_mask_dtype = static_cast<MaskDtype>(attn_mask_dtype);
  std::tie(problem.key_mask_batch, problem.key_mask_key) = key_mask;
  std::tie(problem.alibi_slopes_batch, problem.alibi_slopes_head) = alibi_slopes;
  problem.mask_bits = {nullptr, std::get<0>(mask_bits), std::get<1>(mask_bits), std::get<2>(mask_bits)};
  problem.row_tiles = {nullptr, std::get<0>(row_tiles), std::get<1>(row_tiles), std::get<2>(row_tiles), num_tiles};
  return py::bytes(reinterpret_cast<const char*>(&problem), sizeof(problem));
}

constexpr int kNumAddresses = 16;
using Addresses = std::array<void*, kNumAddresses>;

AttentionProblem placed(const char* bytes, size_t num_bytes, const Addresses& addresses) {
  AttentionProblem problem;
  if (num_bytes != sizeof(problem)) throw std::invalid_argument("the problem must be what cuda_problem returned");
  std::memcpy(static_cast<void*>(&problem), bytes, sizeof(problem));
  const void* const* address = addresses.data();
  const auto place = [&address](auto& pointer) {
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(const_cast<void*>(*address++));
  };
  place(problem.query.data);
  place(problem.key.data);
  place(problem.value.data);
  place(problem.out.data);
  place(problem.lse);
  place(problem.attn_mask.data);
  place(problem.key_mask);
  place(problem.key_lengths);
  place(problem.query_lengths);
  place(problem.alibi_slopes);
  place(problem.sinks);
  place(problem.rng_state);
  place(problem.cu_seqlens_q);
  place(problem.cu_seqlens_k);
  place(problem.mask_bits.data);
  place(problem.row_tiles.data);
  return problem;
}

// A problem as cuda_problem makes it, with what a backward call has beyond it.
struct BackwardProblem {
  AttentionProblem problem;
  cuda::SideGradients side;
};

py::bytes cuda_backward_problem(const py::bytes& problem, const Strides& dout, const Strides& dquery, const Strides& dkey,
                                const Strides& dvalue, const Strides& dattn_mask, const std::tuple<int64_t, int64_t>& mask_sizes,
                                const Strides& column_tiles, int32_t num_tiles, bool deterministic, int kernels) {
  const std::string bytes = problem;
  BackwardProblem backward;
  if (bytes.size() != sizeof(backward.problem)) throw std::invalid_argument("the problem must be what cuda_problem returned");
  std::memcpy(static_cast<void*>(&backward.problem), bytes.data(), bytes.size());
  backward.problem.dout = unplaced(dout);
  backward.problem.dquery = unplaced(dquery);
  backward.problem.dkey = unplaced(dkey);
  backward.problem.dvalue = unplaced(dvalue);
  backward.side.dattn_mask = unplaced(dattn_mask);
  std::tie(backward.side.mask_batches, backward.side.mask_heads) = mask_sizes;
  backward.side.column_tiles = {nullptr, std::get<0>(column_tiles), std::get<1>(column_tiles), std::get<2>(column_tiles), num_tiles};
  backward.side.deterministic = deterministic;
  backward.side.kernels = static_cast<cuda::BackwardKernels>(kernels);
  return py::bytes(reinterpret_cast<const char*>(&backward), sizeof(backward));
}

constexpr int kNumGradientAddresses = 10;
using GradientAddresses = std::array<Address, kNumGradientAddresses>;

cuda::Plan backward_plan(const py::bytes& problem, const cuda::DeviceLimits& limits, Address workspace,
                         const std::array<Address, kNumAddresses>& addresses, const GradientAddresses& gradients) {
  const std::string bytes = problem;
  BackwardProblem backward;
  if (bytes.size() != sizeof(backward)) throw std::invalid_argument("the problem must be what cuda_backward_problem returned");
  std::memcpy(static_cast<void*>(&backward), bytes.data(), bytes.size());
  Addresses pointers;
  for (int i = 0; i < kNumAddresses; ++i) pointers[i] = reinterpret_cast<void*>(addresses[i]);
  backward.problem = placed(reinterpret_cast<const char*>(&backward.problem), sizeof(backward.problem), pointers);
  const Address* address = gradients.data();
  const auto place = [&address](auto& pointer) { pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(*address++); };
  place(backward.problem.dout.data);
  place(backward.problem.dlse);
  place(backward.problem.dquery.data);
  place(backward.problem.dkey.data);
  place(backward.problem.dvalue.data);
  place(backward.side.dattn_mask.data);
  place(backward.side.row_sums);
  place(backward.side.column_sums);
  place(backward.side.slope_sums);
  place(backward.side.column_tiles.data);
  return cuda::plan_backward(backward.problem, backward.side, limits, reinterpret_cast<void*>(workspace));
}

// Returns the bytes of workspace wanted; 0 = launched.
size_t cuda_backward(const py::bytes& problem, int device, Address stream, Address workspace,
                     const std::array<Address, kNumAddresses>& addresses, const GradientAddresses& gradients) {
  const cuda::Plan plan = backward_plan(problem, cuda::device_limits(device), workspace, addresses, gradients);
  if (plan.workspace_bytes != 0 && workspace == 0) return plan.workspace_bytes;
  py::gil_scoped_release released;
  cuda::launch(device, reinterpret_cast<void*>(stream), plan);
  return 0;
}

py::tuple as_tuple(const cuda::Plan& plan) {
  py::list launches;
  for (const cuda::Launch& launch : plan.launches) {
    const py::bytes arguments(reinterpret_cast<const char*>(launch.arguments), launch.argument_bytes);
    launches.append(py::make_tuple(launch.image->name, launch.blocks, launch.threads, launch.shared_bytes, arguments));
  }
  return py::make_tuple(plan.workspace_bytes, launches);
}

py::tuple cuda_plan(const py::bytes& problem, int compute_capability, int multiprocessors, int shared_bytes, Address workspace,
                    const std::array<Address, kNumAddresses>& addresses) {
  Addresses pointers;
  for (int i = 0; i < kNumAddresses; ++i) pointers[i] = reinterpret_cast<void*>(addresses[i]);
  const std::string bytes = problem;
  const cuda::Plan plan = cuda::plan_forward(placed(bytes.data(), bytes.size(), pointers),
                                             {compute_capability, multiprocessors, shared_bytes}, reinterpret_cast<void*>(workspace));
  return as_tuple(plan);
}

// cuda_forward(problem, device, stream, workspace, addresses...) -> bytes of workspace wanted; 0 = launched. Without pybind11's
// conversions, which take longer than everything else here.
PyObject* cuda_forward(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  constexpr int kBeforeAddresses = 4;
  if (num_arguments != kBeforeAddresses + kNumAddresses || !PyBytes_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "cuda_forward takes a problem, device, stream, workspace and 16 addresses");
    return nullptr;
  }
  const long device = PyLong_AsLong(arguments[1]);
  void* const stream = PyLong_AsVoidPtr(arguments[2]);
  void* const workspace = PyLong_AsVoidPtr(arguments[3]);
  Addresses addresses;
  for (int i = 0; i < kNumAddresses; ++i) addresses[i] = PyLong_AsVoidPtr(arguments[kBeforeAddresses + i]);
  if (PyErr_Occurred()) return nullptr;
  try {
    size_t wanted = 0;
    {
      const py::gil_scoped_release released;
      const AttentionProblem problem = placed(PyBytes_AS_STRING(arguments[0]), PyBytes_GET_SIZE(arguments[0]), addresses);
      const cuda::Plan plan = cuda::plan_forward(problem, cuda::device_limits(static_cast<int>(device)), workspace);
      if (plan.workspace_bytes == 0 || workspace != nullptr) {
        cuda::launch(static_cast<int>(device), stream, plan);
      } else {
        wanted = plan.workspace_bytes;
      }
    }
    return PyLong_FromSize_t(wanted);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef cuda_forward_definition = {"cuda_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cuda_forward)),
                                       METH_FASTCALL, "Launches the forward kernels, or says how many bytes of workspace they want."};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native attention kernels. Import torch first, so that both share one OpenMP runtime.";
  module.def("cpu_forward", &cpu_forward, "Writes out and lse; see kernels/native.py for the arguments.");
  module.def("cpu_problem", &cpu_problem_bytes, "A problem for cpu_repeat, from the arguments of cpu_forward.");
  module.attr("cpu_repeat") = py::reinterpret_steal<py::object>(PyCFunction_New(&cpu_repeat_definition, nullptr));
  module.def("cpu_weights", &cpu_weights, "Writes the weights to `out`; the arguments of cpu_forward, then whether to average heads.");
  module.def("cpu_backward", &cpu_backward, "Writes every gradient; see kernels/native.py for the arguments.");
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
  module.attr("cuda_forward") = py::reinterpret_steal<py::object>(PyCFunction_New(&cuda_forward_definition, nullptr));
  module.def("cuda_problem", &cuda_problem, py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("num_tokens"), py::arg("scale"),
             py::arg("causal"), py::arg("window"), py::arg("softcap"), py::arg("dropout_threshold"), py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("out"), py::arg("attn_mask"), py::arg("attn_mask_key"), py::arg("attn_mask_dtype"),
             py::arg("key_mask"), py::arg("alibi_slopes"), py::arg("mask_bits"), py::arg("row_tiles"), py::arg("num_tiles"),
             "All of a problem but its addresses, for cuda_forward and cuda_plan.");
  module.def("cuda_plan", &cuda_plan,
             "What cuda_forward would launch: bytes of workspace, and (name, blocks, threads, shared, arguments).");
  module.def("cuda_backward_problem", &cuda_backward_problem,
             "A problem of cuda_problem with the strides of gradients, for cuda_backward.");
  module.def("cuda_backward", &cuda_backward, "Launches the backward kernels, or says how many bytes of workspace they want.");
  module.def(
      "cuda_backward_plan",
      [](const py::bytes& problem, int compute_capability, int multiprocessors, int shared_bytes, Address workspace,
         const std::array<Address, kNumAddresses>& addresses, const GradientAddresses& gradients) {
        return as_tuple(backward_plan(problem, {compute_capability, multiprocessors, shared_bytes}, workspace, addresses, gradients));
      },
      "What cuda_backward would launch, like cuda_plan.");
  module.def(
      "cuda_why_not",
      [](int device) -> py::object {
        const std::string reason = cuda::why_not(device);
        return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
      },
      "Why the CUDA kernels cannot run on a device (-1: on any), or None.");
  module.def("cuda_set_short_kernels", &cuda::set_short_kernels,
             "Whether kernels for short sequences are used where they can be; returns whether they were.");
  module.def("cuda_device_count", &cuda::device_count, "How many GPUs the NVIDIA driver sees; 0 without a driver.");
  module.def(
      "cuda_versions", [] { return py::make_tuple(cuda::driver_version(), cuda::kToolkitVersion); },
      "Of CUDA, that the driver supports (0 without one) and that compiled the kernels (0 without any); 13000 is 13.0.");
  module.def("cuda_built", [] { return cuda::kBuilt; }, "What compiled the kernels, for which GPUs; empty in a build without CUDA.");
  module.def(
      "cuda_device_limits",
      [](int device) {
        const cuda::DeviceLimits limits = cuda::device_limits(device);
        return py::make_tuple(limits.compute_capability, limits.multiprocessors, limits.shared_bytes);
      },
      "Compute capability times ten, multiprocessors and bytes of shared memory for a block.");
  module.def(
      "cuda_images",
      [] {
        py::list names;
        for (int i = 0; i < cuda::kNumImages; ++i) names.append(cuda::kImages[i].name);
        return names;
      },
      "The kernels in this build.");
}
