// What Python calls, through ctypes. Strings returned belong to the library and live until the next call of the same function.
#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

#include "global_memory.h"
#include "global_races.h"
#include "ptx_interpreter.h"
#include "race_detector.h"
#include "shared_memory.h"
#include "tma.h"

using namespace emulator;

namespace {

std::string last_error;

const Function* find_entry(const Module& module, const char* name) {
  const auto found = module.function_index.find(name);
  return found == module.function_index.end() || !module.functions[found->second].is_entry ? nullptr : &module.functions[found->second];
}

// Blocks in an order drawn from the seed: none may depend on another having run.
std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  if (launch.schedule.seed)
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* emulator_last_error() { return last_error.c_str(); }

// nullptr if the text cannot be understood: emulator_last_error() says what.
Module* emulator_parse(const char* text) {
  try {
    return parse_ptx(text).release();
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

void emulator_free(Module* module) { delete module; }

// The names of the kernels, one per line.
const char* emulator_entries(const Module* module) {
  static std::string names;
  names.clear();
  for (const Function& function : module->functions)
    if (function.is_entry) names += function.name + "\n";
  return names.c_str();
}

int emulator_num_parameters(const Module* module, const char* entry) { return int(find_entry(*module, entry)->parameters.size()); }
uint32_t emulator_parameter_bytes(const Module* module, const char* entry, int i) {
  return find_entry(*module, entry)->parameters[i].bytes;
}
uint32_t emulator_max_threads(const Module* module, const char* entry) { return find_entry(*module, entry)->max_threads; }
uint32_t emulator_static_shared_bytes(const Module* module) { return module->dynamic_shared_offset(); }

void emulator_clear_buffers() { clear_buffers(); }
void emulator_add_buffer(uint64_t data, uint64_t bytes, const char* name) { add_buffer(reinterpret_cast<void*>(data), bytes, name); }

// nullptr, or why cuTensorMapEncodeTiled would refuse.
const char* emulator_encode_tensor_map(void* map, uint32_t element_bytes, uint32_t rank, uint64_t base, const uint64_t* dim,
                                       const uint64_t* stride, const uint32_t* box, uint32_t swizzle) {
  return encode_tensor_map(static_cast<TensorMap*>(map), element_bytes, rank, base, dim, stride, box, swizzle);
}

struct LaunchArguments {
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;  // dynamic
  uint64_t seed, max_instructions;
  int32_t order, delivery, check_races, strict_proxy, report_uninitialized, ordered_additions, registers_per_thread;
  uint32_t resident_blocks;
};

// The caller has checked the arguments: an entry of the module, sizes within the limits, every parameter's bytes.
void emulator_launch(const Module* module, const char* entry, const LaunchArguments* arguments, const void* const* parameters) {
  const Function& function = *find_entry(*module, entry);
  static std::vector<uint64_t> storage;  // keeps parameters aligned for tensor maps
  storage.assign(function.parameter_bytes / 8 + 9, 0);
  uint8_t* values = reinterpret_cast<uint8_t*>((uint64_t(storage.data()) + 63) / 64 * 64);
  for (size_t i = 0; i < function.parameters.size(); ++i)
    memcpy(values + function.parameters[i].offset, parameters[i], function.parameters[i].bytes);

  const LaunchArguments& a = *arguments;
  launch = Launch{};
  launch.grid = {a.grid[0], a.grid[1], a.grid[2]};
  launch.block = {a.block[0], a.block[1], a.block[2]};
  launch.num_threads = a.block[0] * a.block[1] * a.block[2];
  launch.num_warps = (launch.num_threads + 31) / 32;
  launch.num_blocks = uint64_t(a.grid[0]) * a.grid[1] * a.grid[2];
  launch.resident_blocks = uint32_t(std::min<uint64_t>(a.resident_blocks, launch.num_blocks));
  launch.registers_per_thread = a.registers_per_thread;
  launch.schedule = {a.seed,
                     WarpOrder(a.order),
                     Delivery(a.delivery),
                     bool(a.check_races),
                     bool(a.strict_proxy),
                     bool(a.report_uninitialized),
                     bool(a.ordered_additions),
                     a.max_instructions};
  counts = Counts{};
  seed_random_numbers(a.seed);
  begin_reports();
  for (const auto& [name, variable] : module->variables) add_buffer(variable.data.get(), variable.bytes, name);
  begin_launch_global_memory();
  begin_launch_global_races();
  begin_launch_other_blocks();
  begin_launch_tma();
  begin_launch_shared_memory(module->dynamic_shared_offset() + a.shared_bytes);
  begin_launch_races();
  begin_ptx_launch(*module, function, values);
  reserve_fiber_stacks(size_t(launch.num_threads) * launch.resident_blocks);
  run_blocks(block_order(launch.num_blocks), run_ptx_thread);
  land_late_stores();
}

struct ReportData {
  const char *kind, *message, *where;
  uint32_t block[3];
  int32_t thread;
  uint64_t count;
};

int emulator_num_reports() { return int(reports().size()); }
ReportData emulator_report(int i) {
  const Report& report = reports()[i];
  return {report.kind.c_str(),  report.message.c_str(),
          report.where.c_str(), {report.block[0], report.block[1], report.block[2]},
          report.thread,        report.count};
}
Counts emulator_counts() { return counts; }

}  // extern "C"
#pragma GCC visibility pop
