// Threads that wait in vain, explained.
#pragma once
#include "scheduler.h"

namespace emulator {

// Reports the threads of a block that can never run again.
void report_deadlock(Block&);

}  // namespace emulator
