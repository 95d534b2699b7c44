#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "race_detector.h"

namespace emulator {
namespace {

size_t size;
constexpr uint32_t FLIGHT_GRANULE = 4;  // bytes: the smallest asynchronous copy

}  // namespace

struct SharedMemory {
  // Aligned so that generic pointers into it have the alignment of their offsets.
  alignas(1024) uint8_t memory[MAX_SHARED_BYTES];
  std::vector<uint8_t> flying;  // one flag per granule
};

const uint16_t OUT_OF_RANGE[8] = {0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff};

void begin_launch_shared_memory(size_t bytes) { size = (bytes + 15) / 16 * 16; }

void begin_block_shared_memory(Block& block) {
  if (!block.shared_memory) block.shared_memory = std::make_shared<SharedMemory>();
  memset(block.shared_memory->memory, 0xff, size);
  block.shared_memory->flying.assign(size / FLIGHT_GRANULE, 0);
}

uint8_t* shared_memory() { return running->shared_memory->memory; }
size_t shared_size() { return size; }

bool shared_range_ok(uint32_t address, uint32_t bytes, const char* what, Location where) {
  if (address >= SHARED_BASE && uint64_t(address) + bytes <= SHARED_BASE + size) return true;
  report("smem-oob", where, "%s of %u bytes at smem%+lld, outside the block's %zu bytes of shared memory", what, bytes,
         (long long)address - SHARED_BASE, size);
  return false;
}

void begin_flight(uint32_t offset, uint32_t bytes) {
  memset(shared_memory() + offset, 0xff, bytes);
  memset(&running->shared_memory->flying[offset / FLIGHT_GRANULE], 1, bytes / FLIGHT_GRANULE);
}

void end_flight(uint32_t offset, uint32_t bytes) {
  memset(&running->shared_memory->flying[offset / FLIGHT_GRANULE], 0, bytes / FLIGHT_GRANULE);
}

bool in_flight(uint32_t offset, uint32_t bytes) {
  const uint8_t* flying = running->shared_memory->flying.data();
  for (uint32_t i = offset / FLIGHT_GRANULE; i <= (offset + bytes - 1) / FLIGHT_GRANULE; ++i)
    if (flying[i]) return true;
  return false;
}

void check_shared_read(const Thread& thread, uint32_t offset, uint32_t bytes, Location where) {
  ++counts.shared_reads;
  if (in_flight(offset, bytes))
    report("in-flight-read", where, "reads smem+0x%x while an asynchronous copy into it is still in flight", offset);
  if (launch.schedule.check_races) race_read(offset, bytes, access_by(thread, where));
}

void check_shared_write(const Thread& thread, uint32_t offset, uint32_t bytes, Location where, const void* data) {
  ++counts.shared_writes;
  if (in_flight(offset, bytes))
    report("in-flight-write", where, "writes smem+0x%x while an asynchronous copy into it is still in flight", offset);
  if (launch.schedule.check_races) race_write(offset, bytes, access_by(thread, where), data);
}

}  // namespace emulator
