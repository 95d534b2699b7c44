#include "global_memory.h"

#include <algorithm>
#include <vector>

#include "scheduler.h"

namespace emulator {
namespace {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
};

// Buffers that overlap (several views of one array) form one region.
struct Region {
  uintptr_t begin, end;
  std::vector<Buffer> buffers;
  std::vector<uint32_t> writer;  // of each granule: 1 + the block that last wrote it in this launch; empty until a write
};

constexpr uintptr_t GRANULE = 1;  // bytes: neighbours may belong to different blocks
std::vector<Buffer> buffers;
std::vector<Region> regions;  // in order of address
size_t last_region;

Region* find_region(uintptr_t address) {
  if (last_region < regions.size() && address >= regions[last_region].begin && address < regions[last_region].end)
    return &regions[last_region];
  for (size_t i = 0; i < regions.size(); ++i)
    if (address >= regions[i].begin && address < regions[i].end) {
      last_region = i;
      return &regions[i];
    }
  return nullptr;
}

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
    if (regions.empty() || buffer.begin >= regions.back().end) regions.push_back({buffer.begin, buffer.end, {}, {}});
    regions.back().end = std::max(regions.back().end, buffer.end);
    regions.back().buffers.push_back(buffer);
  }
}

bool global_range_ok(const void* address, size_t bytes, const char* what, Location where) {
  const uintptr_t begin = uintptr_t(address);
  const Buffer* near = nullptr;
  if (Region* region = find_region(begin))
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

void check_global_access(const void* address, size_t bytes, bool is_write, Location where) {
  Region* region = find_region(uintptr_t(address));
  if (!region || !launch.schedule.check_races || (!is_write && region->writer.empty())) return;
  if (region->writer.empty()) region->writer.assign((region->end - region->begin) / GRANULE + 1, 0);
  const Dim3 index = launch.block_index;
  const uint32_t block = 1 + index.x + launch.grid.x * (index.y + launch.grid.y * index.z);
  const uintptr_t offset = uintptr_t(address) - region->begin;
  for (uintptr_t i = offset / GRANULE; i <= (offset + bytes - 1) / GRANULE; ++i) {
    uint32_t& writer = region->writer[i];
    if (writer && writer != block) {
      report("global-race", where, "%s %s+%zu, which block number %u wrote in the same launch", is_write ? "writes" : "reads",
             region->buffers[0].name.c_str(), size_t(offset), writer - 1);
      return;
    }
    if (is_write) writer = block;
  }
}

}  // namespace emulator
