// Global memory: the arrays that a launch may touch. Every access must lie inside one of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace emulator {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
};

// Buffers that overlap (several views of one array) form one region.
struct Region {
  uintptr_t begin, end;
  std::vector<Buffer> buffers;
  std::vector<uint32_t> writers, readers;  // what global_races.cpp remembers of each byte; empty until there is something
};

void clear_buffers();
void add_buffer(const void* data, size_t bytes, const std::string& name);
void begin_launch_global_memory();

std::vector<Region>& global_regions();
Region* find_region(const void* address);  // nullptr: no buffer is there
std::string name_of_global(const void* address);
bool global_range_ok(const void* address, size_t bytes, const char* what, Location);

}  // namespace emulator
