// Races between blocks in global memory: two accesses to the same bytes, one of them a write, without a happens-before edge from one to
// the other (other_blocks.h). Blocks run in any order and at the same time, so this holds for blocks that here ran one after the other.
//
// Strong accesses (relaxed and above, atomics, reductions by TMA) do not race with each other. Of each byte the last write and one read
// since then are kept; reads of arrays that no block has written yet are not. Accesses within a block are not compared.
#pragma once
#include <cstddef>
#include <cstdint>

#include "other_blocks.h"
#include "race_detector.h"
#include "report.h"

namespace emulator {

// addition: to floating-point numbers, where the order of the blocks shows in the result.
enum class Effect : uint8_t { read, write, addition };

struct GlobalAccess {
  Effect effect;
  bool strong, async_proxy;
  Agent agent;  // of the running block
  uint32_t clock;
};
// By the current thread itself.
GlobalAccess plain_access(Effect);
GlobalAccess strong_access(Effect, Order);

// The range is known to lie in a buffer.
void check_global_access(const void* address, size_t bytes, const GlobalAccess&, Location);
// A fence.proxy.async for global memory: the async proxy of those who see it sees what the thread wrote before it.
void fence_global_writes(const Thread&);

void begin_launch_global_races();
void begin_block_global_accesses(Block&);

}  // namespace emulator
