// A happens-before race detector for shared memory, with vector clocks.
//
// Everything that touches shared memory is an agent with a clock: threads, each thread's cp.async copies, each warpgroup's wgmma,
// each mbarrier's TMA loads and each storing thread's TMA stores. A thread knows, per agent, up to which of its clock values all
// accesses have happened before now ("seen"). Synchronising joins what the parties have seen. An access is a race if the previous
// write (or, for a write, a previous read) of the same bytes is newer than what the accessing thread has seen of that agent.
//
// TMA and wgmma access shared memory through the async proxy. A thread's plain writes become visible to it only through
// fence.proxy.async: a second vector, "fenced", says up to which clock value the writes of each agent have been fenced.
//
// Each block has its own agents and clocks; what threads know of other blocks goes along with what they know of their own.
#pragma once
#include <cstdint>
#include <vector>

#include "other_blocks.h"
#include "report.h"
#include "scheduler.h"

namespace emulator {

using Agent = uint32_t;
Agent cp_async_agent(uint32_t thread);
Agent wgmma_agent(uint32_t warpgroup);
Agent new_tma_load_agent(Location);  // one per mbarrier
// Two per storing thread, of which this is the first: its reads of shared memory, and its writes to global memory.
Agent new_tma_store_agent();
Agent global_write_agent(Agent tma_store_agent);
std::string name_of(Agent);

// What a barrier hands from those who arrive to those who wait.
struct Knowledge {
  std::vector<uint32_t> seen, fenced;
  OtherBlocks others, others_fenced;
};
void clear(Knowledge&);
void release(const Thread&, Knowledge&);
void acquire(const Thread&, const Knowledge&);
void set_seen(Knowledge&, Agent, uint32_t clock);

// What a thread knows about asynchronous agents changes when it waits for their work.
void set_seen(const Thread&, Agent, uint32_t clock);
uint32_t seen(const Thread&, Agent);
uint32_t own_clock(const Thread&);
void fence_async_proxy(const Thread&, bool shared_memory, bool global_memory);

// Between blocks: what a release of the thread publishes, and what an acquire receives.
OtherBlocks publish(const Thread&);
void receive(const Thread&, const OtherBlocks&);
// Whether what an agent of another block did up to that clock has happened before now; and whether a fence.proxy.async of this block has
// followed since.
bool knows(const Thread&, uint32_t block, Agent, uint32_t clock);
bool knows_fenced(const Thread&, uint32_t block, Agent, uint32_t clock);

struct Access {
  Agent agent;
  uint32_t clock;  // of the agent
  const uint32_t *seen, *fenced;
  bool async_proxy;
  Location where;
};
Access access_by(const Thread&, Location);
// An access by another agent on behalf of a thread, which knows what the thread knows.
Access access_for(const Thread&, Agent, uint32_t clock, bool async_proxy, Location);
// An access on behalf of a warpgroup: known is what one thread of each of its warps knows.
Access access_for_warpgroup(uint32_t first_thread, Agent, uint32_t clock, Location);

void race_read(uint32_t offset, uint32_t bytes, const Access&);
void race_write(uint32_t offset, uint32_t bytes, const Access&, const void* data = nullptr);

void begin_launch_races();
void begin_block_races(Block&);

}  // namespace emulator
