// Threads that read one place again and again until another thread changes it.
#pragma once
#include <cstdint>

#include "scheduler.h"

namespace emulator {

// The current thread's strong load, or an atomic that changed nothing, found this value. If it found the same the last time, others run
// before it goes on; if nothing can change any more, that is reported and the launch ends.
void note_poll(const void* address, uint64_t value, Location);

void begin_block_polls(Block&);

}  // namespace emulator
