// The 16 named barriers of a block: bar.sync, bar.arrive, bar.red; __syncthreads() is barrier 0 with every thread.
#pragma once
#include <cstdint>

#include "report.h"
#include "scheduler.h"

namespace emulator {

// What bar.red hands to every thread that waits: over the predicates of all that arrived.
struct BarrierVotes {
  uint32_t count = 0;
  bool any = false, all = true;
};

constexpr uint32_t WHOLE_BLOCK = 0;  // as a count of threads
BarrierVotes barrier_sync(uint32_t number, uint32_t num_threads, Location, bool predicate = false);
void barrier_arrive(uint32_t number, uint32_t num_threads, Location);

void begin_block_barriers(Block&);
std::string explain_barrier_wait(const Thread&);

}  // namespace emulator
