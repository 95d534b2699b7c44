// Global memory: the arrays that a launch may touch. Every access must lie inside one of them, and no two blocks may exchange data
// through plain accesses, since blocks run in any order and at the same time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "report.h"

namespace emulator {

void clear_buffers();
void add_buffer(const void* data, size_t bytes, const std::string& name);
void begin_launch_global_memory();

bool global_range_ok(const void* address, size_t bytes, const char* what, Location);
// A plain access by the current block, known to be in range.
void check_global_access(const void* address, size_t bytes, bool is_write, Location);

}  // namespace emulator
