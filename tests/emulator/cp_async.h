// cp.async: copies of 4, 8 or 16 bytes from global to shared memory by single threads (Ampere). They land when their group is waited
// for and not earlier, which is as late as is legal.
#pragma once
#include <cstdint>

#include "report.h"
#include "scheduler.h"

namespace emulator {

// Bytes of the destination beyond source_bytes become zero.
void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes, Location);
void cp_async_commit(Location);
void cp_async_wait(uint32_t groups_left, Location);

// Everything the thread has copied so far lands now (cp.async.mbarrier.arrive); returns the clock of its agent that covers it.
uint32_t cp_async_land_all(Location);

void begin_block_cp_async(Block&);
void check_cp_async_at_exit();

}  // namespace emulator
