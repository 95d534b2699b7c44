// SPDX-License-Identifier: Apache-2.0
// Python bindings: sizes, strides and raw addresses in, an AttentionProblem out. Nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cuda/driver.h"

namespace py = pybind11;
using namespace fused_attention;

namespace {

using Address = uintptr_t;  // 0 = not given
using Pair = std::array<int64_t, 2>;
using Strides = std::array<int64_t, 3>;  // of batch, head and row in elements

// Every tensor of a forward call, in the order of the addresses: inputs and results, then TENSORS of kernels/problem.py.
template <class Visit>
constexpr void visit_tensors(AttentionProblem& problem, Visit visit) {
  visit("query", problem.query.data);
  visit("key", problem.key.data);
  visit("value", problem.value.data);
  visit("out", problem.out.data);
  visit("lse", problem.lse);
  visit("attn_mask", problem.attn_mask.data);
  visit("key_mask", problem.key_mask);
  visit("key_lengths", problem.key_lengths);
  visit("query_lengths", problem.query_lengths);
  visit("alibi_slopes", problem.alibi_slopes);
  visit("sinks", problem.sinks);
  visit("rng_state", problem.rng_state);
  visit("cu_seqlens_q", problem.cu_seqlens_q);
  visit("cu_seqlens_k", problem.cu_seqlens_k);
  visit("mask_bits", problem.mask_bits.data);
  visit("row_tiles", problem.row_tiles.data);
  visit("key_scale", problem.key_scale.data);
  visit("value_scale", problem.value_scale.data);
}

constexpr int kNumAddresses = [] {
  AttentionProblem problem;
  int count = 0;
  visit_tensors(problem, [&](const char*, auto*&) { ++count; });
  return count;
}();
constexpr int kNumInputsAndResults = 5;  // query, key, value, out and lse, which come first
constexpr int kNumCpuGradients = 10, kNumCudaGradients = 10;
using Addresses = std::array<Address, kNumAddresses>;
using CpuGradients = std::array<Address, kNumCpuGradients>;
using CudaGradients = std::array<Address, kNumCudaGradients>;

StridedTensor unplaced(const Strides& strides) { return {nullptr, strides[0], strides[1], strides[2]}; }

// scales: batch, head and block strides, and the keys of a block.
BlockScales unplaced_scales(const std::array<int64_t, 4>& scales) { return {nullptr, scales[0], scales[1], scales[2], scales[3]}; }

template <class Enum>
Enum checked(const char* name, int value) {
  if (value < 0 || value > 2) throw std::invalid_argument(std::string(name) + " must be 0, 1 or 2, is " + std::to_string(value));
  return static_cast<Enum>(value);
}

// Plain data as bytes, which Python can keep and reuse for every call with the same values.
template <class Data>
py::bytes as_bytes(const Data& data) {
  return py::bytes(reinterpret_cast<const char*>(&data), sizeof(data));
}

template <class Data>
Data from_bytes(PyObject* bytes, const char* made_by) {
  Data data;
  const auto message = [&] { return std::string("the problem must be what ") + made_by + " returned"; };
  if (!PyBytes_Check(bytes)) throw py::type_error(message());
  if (PyBytes_GET_SIZE(bytes) != sizeof(data)) throw std::invalid_argument(message());
  std::memcpy(static_cast<void*>(&data), PyBytes_AS_STRING(bytes), sizeof(data));
  return data;
}

// A problem without its addresses.
py::bytes problem_bytes(int dtype, const std::array<int64_t, 7>& sizes, const Pair& num_tokens, double scale,
                        const std::array<int32_t, 2>& window, int32_t diagonal, bool bottom_right, double softcap,
                        uint32_t dropout_threshold, const Strides& query, const Strides& key, const Strides& value, const Strides& out,
                        const Strides& attn_mask, int64_t attn_mask_key, int attn_mask_dtype, const Pair& key_mask,
                        const Pair& alibi_slopes, const Strides& mask_bits, const Strides& row_tiles, int32_t num_tiles, int cache_dtype,
                        const std::array<int64_t, 4>& key_scale, const std::array<int64_t, 4>& value_scale) {
  AttentionProblem problem;
  problem.dtype = checked<Dtype>("dtype", dtype);
  problem.batch = sizes[0], problem.num_heads = sizes[1], problem.num_heads_kv = sizes[2];
  problem.seqlen_q = sizes[3], problem.seqlen_k = sizes[4];
  problem.head_dim_qk = sizes[5], problem.head_dim_v = sizes[6];
  problem.num_tokens_q = num_tokens[0], problem.num_tokens_k = num_tokens[1];
  problem.softmax_scale = static_cast<float>(scale);
  problem.window_left = window[0], problem.window_right = window[1];
  problem.diagonal = diagonal, problem.bottom_right = bottom_right;
  problem.softcap = static_cast<float>(softcap);
  problem.dropout_threshold = dropout_threshold;
  problem.query = unplaced(query);
  problem.key = unplaced(key);
  problem.value = unplaced(value);
  problem.out = problem.out_error = unplaced(out);
  problem.attn_mask = unplaced(attn_mask);
  problem.attn_mask_key = attn_mask_key;
  problem.attn_mask_dtype = static_cast<MaskDtype>(attn_mask_dtype);
  problem.key_mask_batch = key_mask[0], problem.key_mask_key = key_mask[1];
  problem.alibi_slopes_batch = alibi_slopes[0], problem.alibi_slopes_head = alibi_slopes[1];
  problem.mask_bits = {nullptr, mask_bits[0], mask_bits[1], mask_bits[2]};
  problem.row_tiles = {nullptr, row_tiles[0], row_tiles[1], row_tiles[2], num_tiles};
  problem.cache_dtype = cache_dtype < 0 ? CacheDtype::none : checked<CacheDtype>("cache_dtype", cache_dtype);
  problem.key_scale = unplaced_scales(key_scale);
  problem.value_scale = unplaced_scales(value_scale);
  return as_bytes(problem);
}

py::bytes with_bf16x3(const py::bytes& bytes) {
  auto problem = from_bytes<AttentionProblem>(bytes.ptr(), "problem");
  problem.bf16x3 = true;
  return as_bytes(problem);
}

// Assigns the addresses to the pointers, in order.
template <size_t kNum, class... T>
void place(const std::array<Address, kNum>& addresses, T*&... pointers) {
  static_assert(sizeof...(T) == kNum);
  const Address* address = addresses.data();
  ((pointers = reinterpret_cast<T*>(*address++)), ...);
}

void place_tensors(AttentionProblem& problem, const Addresses& addresses) {
  const Address* address = addresses.data();
  visit_tensors(problem, [&](const char*, auto*& pointer) { pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(*address++); });
}

AttentionProblem placed(PyObject* bytes, const Addresses& addresses) {
  auto problem = from_bytes<AttentionProblem>(bytes, "problem");
  place_tensors(problem, addresses);
  return problem;
}

// Parses the arguments (problem, integers, addresses of inputs and results, a tuple or list of those of optional tensors) without pybind11,
// whose conversions take longer than a small kernel.
template <int kNumIntegers>
struct RawArguments {
  std::array<Address, kNumIntegers> integers;
  AttentionProblem problem;

  RawArguments(PyObject* const* arguments, Py_ssize_t num_arguments, const char* expected) {
    constexpr int kNumApart = 1 + kNumIntegers + kNumInputsAndResults, kNumOptional = kNumAddresses - kNumInputsAndResults;
    PyObject* const optional = num_arguments == kNumApart + 1 ? arguments[kNumApart] : nullptr;
    if (!optional || !(PyTuple_Check(optional) || PyList_Check(optional)) || PySequence_Fast_GET_SIZE(optional) != kNumOptional)
      throw py::type_error(expected);
    const auto integer = [](PyObject* object) { return reinterpret_cast<Address>(PyLong_AsVoidPtr(object)); };
    Addresses addresses;
    for (int i = 0; i < kNumIntegers; ++i) integers[i] = integer(arguments[1 + i]);
    for (int i = 0; i < kNumInputsAndResults; ++i) addresses[i] = integer(arguments[1 + kNumIntegers + i]);
    for (int i = 0; i < kNumOptional; ++i) addresses[kNumInputsAndResults + i] = integer(PySequence_Fast_GET_ITEM(optional, i));
    if (PyErr_Occurred()) throw py::error_already_set();
    problem = placed(arguments[0], addresses);
  }
};

template <class Function>
PyObject* with_python_errors(Function function) {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

using RawFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef raw_definition(const char* name, RawFunction function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

// cpu_forward(problem, num_threads, out_error or 0, query, key, value, out, lse, optional)
PyObject* cpu_forward(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  return with_python_errors([&] {
    RawArguments<2> given(arguments, num_arguments,
                          "cpu_forward takes a problem, a number of threads, out_error and the problem's addresses");
    given.problem.out_error.data = reinterpret_cast<void*>(given.integers[1]);
    const py::gil_scoped_release released;
    cpu::forward(given.problem, static_cast<int>(given.integers[0]));
    return Py_NewRef(Py_None);
  });
}

// cpu_linear(num_threads, x, x_row, weight, weight_row, bias, out, rows, in_features, out_features)
PyObject* cpu_linear(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  return with_python_errors([&] {
    std::array<int64_t, 10> given;
    if (num_arguments != static_cast<Py_ssize_t>(given.size())) throw py::type_error("cpu_linear takes ten integers");
    for (size_t i = 0; i < given.size(); ++i) given[i] = PyLong_AsLongLong(arguments[i]);
    if (PyErr_Occurred()) throw py::error_already_set();
    cpu::Linear linear = {};
    linear.x = reinterpret_cast<const float*>(given[1]), linear.x_row = given[2];
    linear.weight = reinterpret_cast<const float*>(given[3]), linear.weight_row = given[4];
    linear.bias = reinterpret_cast<const float*>(given[5]), linear.out = reinterpret_cast<float*>(given[6]);
    linear.rows = given[7], linear.in_features = given[8], linear.out_features = given[9];
    if (linear.rows > cpu::Linear::kMaxRows) throw std::invalid_argument("cpu_linear takes at most 64 rows");
    const py::gil_scoped_release released;
    cpu::linear(linear, static_cast<int>(given[0]));
    return Py_NewRef(Py_None);
  });
}

void cpu_weights(const py::bytes& problem, int num_threads, const Addresses& addresses, bool average_heads) {
  AttentionProblem weights = placed(problem.ptr(), addresses);
  weights.average_heads = average_heads;
  const py::gil_scoped_release released;
  cpu::weights(weights, num_threads);
}

void cpu_forward_with_weights(const py::bytes& problem, int num_threads, const Addresses& addresses, Address mean_weights) {
  AttentionProblem forward = placed(problem.ptr(), addresses);
  forward.mean_weights = reinterpret_cast<float*>(mean_weights);
  const py::gil_scoped_release released;
  cpu::forward_with_weights(forward, num_threads);
}

// dattn_mask: part, batch, head, row and key strides.
void cpu_backward(const py::bytes& problem, int num_threads, const Addresses& addresses, const CpuGradients& gradients, const Strides& dout,
                  const Strides& dquery, const Strides& dkey, const Strides& dvalue, const std::array<int64_t, 5>& dattn_mask,
                  int32_t num_mask_parts, int32_t num_key_parts) {
  AttentionProblem backward = placed(problem.ptr(), addresses);
  backward.dout = unplaced(dout);
  backward.dquery = unplaced(dquery);
  backward.dkey = unplaced(dkey);
  backward.dvalue = unplaced(dvalue);
  place(gradients, backward.dout.data, backward.dlse, backward.dquery.data, backward.dkey.data, backward.dvalue.data,
        backward.out_error.data, backward.dquery_parts, backward.dattn_mask, backward.dalibi_slopes, backward.dsinks);
  backward.dattn_mask_part = dattn_mask[0], backward.dattn_mask_batch = dattn_mask[1], backward.dattn_mask_head = dattn_mask[2];
  backward.dattn_mask_row = dattn_mask[3], backward.dattn_mask_key = dattn_mask[4];
  backward.num_mask_parts = num_mask_parts;
  backward.num_key_parts = num_key_parts;
  const py::gil_scoped_release released;
  cpu::backward(backward, num_threads);
}

// A problem plus what only a backward call has.
struct CudaBackwardProblem {
  AttentionProblem problem;
  cuda::SideGradients side;
};

py::bytes cuda_backward_problem(const py::bytes& problem, const Strides& dout, const Strides& dquery, const Strides& dkey,
                                const Strides& dvalue, const Strides& dattn_mask, const Pair& mask_sizes, const Strides& column_tiles,
                                int32_t num_tiles, bool deterministic, int kernels) {
  CudaBackwardProblem backward;
  backward.problem = from_bytes<AttentionProblem>(problem.ptr(), "problem");
  backward.problem.dout = unplaced(dout);
  backward.problem.dquery = unplaced(dquery);
  backward.problem.dkey = unplaced(dkey);
  backward.problem.dvalue = unplaced(dvalue);
  backward.side.dattn_mask = unplaced(dattn_mask);
  backward.side.mask_batches = mask_sizes[0], backward.side.mask_heads = mask_sizes[1];
  backward.side.column_tiles = {nullptr, column_tiles[0], column_tiles[1], column_tiles[2], num_tiles};
  backward.side.deterministic = deterministic;
  backward.side.kernels = static_cast<cuda::BackwardKernels>(kernels);
  return as_bytes(backward);
}

cuda::Plan backward_plan(const py::bytes& problem, const cuda::DeviceLimits& limits, Address workspace, const Addresses& addresses,
                         const CudaGradients& gradients) {
  auto backward = from_bytes<CudaBackwardProblem>(problem.ptr(), "cuda_backward_problem");
  place_tensors(backward.problem, addresses);
  place(gradients, backward.problem.dout.data, backward.problem.dlse, backward.problem.dquery.data, backward.problem.dkey.data,
        backward.problem.dvalue.data, backward.side.dattn_mask.data, backward.side.row_sums, backward.side.column_sums,
        backward.side.slope_sums, backward.side.column_tiles.data);
  return cuda::plan_backward(backward.problem, backward.side, limits, reinterpret_cast<void*>(workspace));
}

// Returns the workspace bytes needed, or 0 after launching.
size_t cuda_backward(const py::bytes& problem, int device, Address stream, Address workspace, const Addresses& addresses,
                     const CudaGradients& gradients) {
  const cuda::Plan plan = backward_plan(problem, cuda::device_limits(device), workspace, addresses, gradients);
  if (plan.workspace_bytes != 0 && workspace == 0) return plan.workspace_bytes;
  const py::gil_scoped_release released;
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
                    const Addresses& addresses) {
  return as_tuple(cuda::plan_forward(placed(problem.ptr(), addresses), {compute_capability, multiprocessors, shared_bytes},
                                     reinterpret_cast<void*>(workspace)));
}

py::tuple cuda_backward_plan(const py::bytes& problem, int compute_capability, int multiprocessors, int shared_bytes, Address workspace,
                             const Addresses& addresses, const CudaGradients& gradients) {
  return as_tuple(backward_plan(problem, {compute_capability, multiprocessors, shared_bytes}, workspace, addresses, gradients));
}

// cuda_forward(problem, device, stream, workspace, query, key, value, out, lse, optional) -> workspace bytes needed, or 0 after launching
PyObject* cuda_forward(PyObject*, PyObject* const* arguments, Py_ssize_t num_arguments) {
  return with_python_errors([&] {
    const RawArguments<3> given(arguments, num_arguments,
                                "cuda_forward takes a problem, device, stream, workspace and the problem's addresses");
    const int device = static_cast<int>(given.integers[0]);
    const auto stream = reinterpret_cast<void*>(given.integers[1]), workspace = reinterpret_cast<void*>(given.integers[2]);
    size_t wanted = 0;
    {
      const py::gil_scoped_release released;
      const cuda::Plan plan = cuda::plan_forward(given.problem, cuda::device_limits(device), workspace);
      if (plan.workspace_bytes == 0 || workspace != nullptr) {
        cuda::launch(device, stream, plan);
      } else {
        wanted = plan.workspace_bytes;
      }
    }
    return PyLong_FromSize_t(wanted);
  });
}

PyMethodDef raw_functions[] = {
    raw_definition("cpu_forward", cpu_forward, "Writes out and lse of a problem."),
    raw_definition("cuda_forward", cuda_forward, "Launches the forward kernels, or returns how many bytes of workspace they need."),
    raw_definition("cpu_linear", cpu_linear, "Writes x weight^T + bias for a few rows of x."),
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native attention kernels. Import torch first, so that both share one OpenMP runtime.";
  for (PyMethodDef& function : raw_functions) {
    module.attr(function.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&function, nullptr));
  }
  module.def("problem", &problem_bytes, py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("num_tokens"), py::arg("scale"),
             py::arg("window"), py::arg("diagonal"), py::arg("bottom_right"), py::arg("softcap"), py::arg("dropout_threshold"),
             py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"), py::arg("attn_mask"), py::arg("attn_mask_key"),
             py::arg("attn_mask_dtype"), py::arg("key_mask"), py::arg("alibi_slopes"), py::arg("mask_bits"), py::arg("row_tiles"),
             py::arg("num_tiles"), py::arg("cache_dtype"), py::arg("key_scale"), py::arg("value_scale"),
             "A problem without its addresses.");
  module.def("with_bf16x3", &with_bf16x3, "The same problem, whose float32 numbers may be split into two of bfloat16.");
  module.def(
      "address_names",
      [] {
        AttentionProblem problem;
        py::list names;
        visit_tensors(problem, [&](const char* name, auto*&) { names.append(name); });
        return names;
      },
      "The tensors of a forward call, in the order of their addresses.");
  module.def("cpu_weights", &cpu_weights, "Writes the weights, or their mean over heads, to `out`.");
  module.def("cpu_forward_with_weights", &cpu_forward_with_weights, "Writes out, lse and the mean of the weights over heads.");
  module.def("cpu_backward", &cpu_backward, "Writes every gradient.");
  module.def("cpu_has_bf16x3", &cpu::has_bf16x3,
             "Whether this machine has kernels for with_bf16x3; they run with the best instruction set.");
  module.def("cpu_key_parts", &cpu::key_parts, "How many parts cpu_backward sums over the keys of a sequence in.");
  module.def(
      "cpu_isa", [] { return cpu::selected_table().name; }, "The instruction set in use; FUSED_ATTENTION_CPU_ISA forces a lower one.");
  module.def(
      "cpu_isas",
      [] {
        py::list names;
        for (const cpu::KernelTable* table : cpu::available_tables()) names.append(table->name);
        return names;
      },
      "Every instruction set this machine can run, best first.");
  module.def("cuda_plan", &cuda_plan,
             "What cuda_forward would launch: workspace bytes, and a list of (name, blocks, threads, shared, arguments).");
  module.def("cuda_backward_problem", &cuda_backward_problem, "A problem with the strides of gradients, for cuda_backward.");
  module.def("cuda_backward", &cuda_backward, "Launches the backward kernels, or returns how many bytes of workspace they need.");
  module.def("cuda_backward_plan", &cuda_backward_plan, "What cuda_backward would launch, like cuda_plan.");
  module.def(
      "cuda_why_not",
      [](int device) -> py::object {
        const std::string reason = cuda::why_not(device);
        return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
      },
      "Why the CUDA kernels cannot run on a device (-1: on any), or None.");
  module.def("cuda_set_single_tile_kernels", &cuda::set_single_tile_kernels,
             "Turns the single-tile kernels on or off; returns the previous setting.");
  module.def("cuda_device_count", &cuda::device_count, "How many GPUs the NVIDIA driver sees; 0 without a driver.");
  module.def(
      "cuda_versions", [] { return py::make_tuple(cuda::driver_version(), cuda::kToolkitVersion); },
      "The CUDA versions that the driver supports and that compiled the kernels, 0 if there are none; 13000 is 13.0.");
  module.def("cuda_built", [] { return cuda::kBuilt; }, "What compiled the kernels, for which GPUs; empty in a build without CUDA.");
  module.def(
      "cuda_device_limits",
      [](int device) {
        const cuda::DeviceLimits limits = cuda::device_limits(device);
        return py::make_tuple(limits.compute_capability, limits.multiprocessors, limits.shared_bytes);
      },
      "Compute capability times ten, multiprocessors, and bytes of shared memory per block.");
  module.def("cuda_device_name", &cuda::device_name, "What the NVIDIA driver calls a GPU.");
  module.def("cuda_has_machine_code", &cuda::has_machine_code,
             "Whether this build has machine code for a compute capability (times ten); otherwise the driver compiles the PTX.");
  module.def(
      "cuda_images",
      [] {
        py::list names;
        for (int i = 0; i < cuda::kNumImages; ++i) names.append(cuda::kImages[i].name);
        return names;
      },
      "The kernels in this build.");
}
