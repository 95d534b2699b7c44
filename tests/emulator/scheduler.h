// The running block: its threads, who may run, who waits for what; and what the whole launch shares.
// One block runs at a time and one thread of it at a time; blocks follow each other in an order drawn from the seed.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "fiber.h"
#include "report.h"

namespace emulator {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// Which ready warp runs next, and whether a warp is interrupted in the middle of what it does (random, priority).
enum class WarpOrder { round_robin, random, priority };
// When an asynchronous copy by TMA lands: as late as is legal, at once, or in between.
enum class Delivery { late, eager, random };

struct Schedule {
  uint64_t seed = 0;
  WarpOrder order = WarpOrder::round_robin;
  Delivery delivery = Delivery::late;
  bool check_races = true;
  bool strict_proxy = true;           // the writing thread itself must fence before it synchronises with the async proxy's reader
  bool report_uninitialized = false;  // reads of shared memory that nobody wrote
  uint64_t max_instructions = 0;      // by one thread of one block; 0: no limit
};

struct Launch {
  Dim3 grid, block, block_index;
  uint32_t num_threads = 0, num_warps = 0;  // of a block
  int registers_per_thread = 0;             // for setmaxnreg; 0: not checked
  Schedule schedule;
};
extern Launch launch;

// How often things happened in a launch, for tests that expect a number and for judging the cost of a test.
struct Counts {
  uint64_t instructions, switches, mma, ldmatrix, shuffles, cp_async, wgmma, tma, shared_reads, shared_writes;
  uint64_t bank_conflicts;  // extra passes of ldmatrix and stmatrix because rows of an 8x8 matrix share banks
};
extern Counts counts;

void seed_random_numbers(uint64_t seed);
uint32_t random_number();

struct Thread {
  Fiber fiber;
  uint32_t index, warp, lane;
  Dim3 thread_index;
  bool exited = false;
  Location location = 0;  // of the last instruction that concerned other threads
  // While blocked:
  const char* waits_for = nullptr;
  Location waits_at = 0;
  uint32_t waits_object = 0, waits_argument = 0;
};
extern std::vector<Thread> threads;  // of the running block
extern Thread* current;

// Runs body() as every thread of block `index`. False: not all threads came to their end, and a report says why.
bool run_block(Dim3 index, void (*body)());

// The current thread cannot go on until set_runnable(it).
void block_current(const char* waits_for, Location where, uint32_t object = 0, uint32_t argument = 0);
void set_runnable(Thread&);
// A point where other warps may run first: randomised schedules sometimes do.
void maybe_preempt();
// Lets every other ready thread run before the current one continues.
void yield_to_others();
// Gives up on the block: nothing of it runs any more. Does not return.
[[noreturn]] void abandon_block();

// Explains one blocked thread in a deadlock report; barriers and mbarriers add what they know.
std::string explain_wait(const Thread&);

}  // namespace emulator
