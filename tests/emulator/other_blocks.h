// What a thread knows of other blocks, by vector clocks, and how it gets to know it: release and acquire at the scope of the GPU.
//
// A release publishes what its thread has seen of its own block, and all that it knows of others; an acquire that reads the value, or one
// that atomics made of it, receives that. A fence with a strong access before (or after) it acquires (or releases) too. What has been
// published never changes, so that threads share it: most of the time two pieces of knowledge are compared by their addresses.
//
// Scope of a block or a cluster: carries nothing here. Within a block the barriers do.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace emulator {

// Of each agent of one block (race_detector.h): up to which clock it has been seen; then, up to which it has been fenced.
using Clocks = std::vector<uint32_t>;
struct BlockClocks {
  uint32_t block;  // number in the grid
  std::shared_ptr<const Clocks> clocks;
};
using OtherBlocks = std::shared_ptr<const std::vector<BlockClocks>>;  // in order of block; nullptr: nothing is known

OtherBlocks joined(const OtherBlocks&, const OtherBlocks&);
inline void join(OtherBlocks& into, const OtherBlocks& from) {  // both are mostly the same, or nothing
  if (from && from != into) into = joined(into, from);
}
// Whether it includes what this agent of another block did up to that clock.
bool includes(const OtherBlocks&, uint32_t block, uint32_t agent, uint32_t clock);

enum class Order : uint8_t { weak, relaxed, acquire, release, acq_rel };  // weak: a plain access
inline bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }
inline bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }

// The current thread's strong accesses to global memory (relaxed or stronger, scope of the GPU), which others may synchronise with.
void strong_read(uint64_t address, Order);
void strong_write(uint64_t address, Order);
void strong_update(uint64_t address, Order, bool writes);  // an atomic: reads and, a failed compare-and-swap excepted, writes
void weak_write(uint64_t address, uint32_t bytes);
void fence_gpu_scope(Location);
// The clock of a strong write: that of the fence which publishes it, if one does.
uint32_t strong_clock(const Thread&, Order);

void begin_launch_other_blocks();
void begin_block_other_blocks(Block&);

}  // namespace emulator
