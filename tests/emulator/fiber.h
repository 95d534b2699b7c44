// Fibers: every CUDA thread of the running block is one, so that a thread can stop in the middle of any instruction (a barrier,
// a shuffle) while the others go on.
#pragma once
#include <cstddef>

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;  // saved while the fiber is not running
};

// Stops `from` and continues `to`; returns when something switches back to `from`.
void switch_fiber(Fiber& from, const Fiber& to);
// A fiber that will run entry() on stack `index` of a pool that is kept from launch to launch. entry() must never return.
Fiber new_fiber(size_t index, void (*entry)());
void reserve_fiber_stacks(size_t count);

}  // namespace emulator
