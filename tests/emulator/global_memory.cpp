#include "global_memory.h"

#include <algorithm>

namespace emulator {
namespace {

std::vector<Buffer> buffers;
std::vector<Region> regions;  // in order of address
size_t last_region;

}  // namespace

void clear_buffers() { buffers.clear(); }

void add_buffer(const void* data, size_t bytes, const std::string& name) {
  if (bytes) buffers.push_back({uintptr_t(data), uintptr_t(data) + bytes, name});
}

void begin_launch_global_memory() {
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  regions.clear();
  last_region = 0;
  for (const Buffer& buffer : buffers) {
    if (regions.empty() || buffer.begin >= regions.back().end) regions.push_back({buffer.begin, buffer.end, {}, {}, {}});
    regions.back().end = std::max(regions.back().end, buffer.end);
    regions.back().buffers.push_back(buffer);
  }
}

std::vector<Region>& global_regions() { return regions; }

Region* find_region(const void* pointer) {
  const uintptr_t address = uintptr_t(pointer);
  if (last_region < regions.size() && address >= regions[last_region].begin && address < regions[last_region].end)
    return &regions[last_region];
  for (size_t i = 0; i < regions.size(); ++i)
    if (address >= regions[i].begin && address < regions[i].end) {
      last_region = i;
      return &regions[i];
    }
  return nullptr;
}

std::string name_of_global(const void* address) {
  const Region* region = find_region(address);
  return region ? region->buffers[0].name + "+" + std::to_string(uintptr_t(address) - region->begin) : "?";
}

bool global_range_ok(const void* address, size_t bytes, const char* what, Location where) {
  const uintptr_t begin = uintptr_t(address);
  const Buffer* near = nullptr;
  if (Region* region = find_region(address))
    for (const Buffer& buffer : region->buffers) {
      if (begin >= buffer.begin && begin + bytes <= buffer.end) return true;
      if (begin >= buffer.begin) near = &buffer;
    }
  if (!near)  // the buffer that begins last before the address, or the first one
    for (const Buffer& buffer : buffers)
      if (!near || buffer.begin <= begin) near = &buffer;
  if (near)
    report("global-oob", where, "%s of %zu bytes at %s%+lld, which has %zu bytes", what, bytes, near->name.c_str(),
           (long long)(begin - near->begin), size_t(near->end - near->begin));
  else
    report("global-oob", where, "%s of %zu bytes at %p: the launch was given no buffers", what, bytes, address);
  return false;
}

}  // namespace emulator
