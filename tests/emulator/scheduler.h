// The resident blocks: their threads, who may run, who waits for what; and what the whole launch shares.
// One thread runs at a time. As many blocks as the schedule says are resident together; when one ends, the next one, in an order drawn
// from the seed, takes its place.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
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
  bool ordered_additions = false;     // blocks must add floating-point numbers to the same bytes in a fixed order
  uint64_t max_instructions = 0;      // by one thread of one block; 0: no limit
};

struct Launch {
  Dim3 grid, block;
  uint64_t num_blocks = 0;
  uint32_t num_threads = 0, num_warps = 0;  // of a block
  uint32_t resident_blocks = 1;             // at most, at a time
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

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  uint32_t index, warp, lane;
  Dim3 thread_index;
  bool exited = false;
  Location location = 0;  // of the last instruction that concerned other threads
  // While blocked:
  const char* waits_for = nullptr;
  Location waits_at = 0;
  uint32_t waits_object = 0, waits_argument = 0;
};

struct Warp {
  uint32_t runnable = 0;  // lanes
  uint64_t priority = 0;  // the lowest number runs first
};

// A resident block. The other parts of the emulator keep here what they know of it; each type is defined where it is used.
struct Block {
  Dim3 index;
  uint32_t number;  // in the grid, x first
  uint32_t slot;    // its place among the resident blocks
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;  // bit set of warps with a runnable lane
  uint32_t num_exited = 0;
  std::shared_ptr<struct SharedMemory> shared_memory;
  std::shared_ptr<struct Races> races;
  std::shared_ptr<struct WarpOperations> warp_operations;
  std::shared_ptr<struct Barriers> barriers;
  std::shared_ptr<struct MBarriers> mbarriers;
  std::shared_ptr<struct CpAsyncCopies> cp_async;
  std::shared_ptr<struct TmaCopies> tma;
  std::shared_ptr<struct Warpgroups> wgmma;
  std::shared_ptr<struct MemoryOrder> memory_order;
  std::shared_ptr<struct GlobalAccesses> global;
  std::shared_ptr<struct Polls> polls;
  std::shared_ptr<struct PtxThreads> ptx;
};
extern Block* running;   // the block of the current thread
extern Thread* current;  // nullptr between threads

// Runs body() as every thread of the blocks of these numbers, in this order. Stops early when some cannot come to their end, or when
// there are too many reports.
void run_blocks(const std::vector<uint64_t>& order, void (*body)());
// Blocks that have not started yet.
uint64_t blocks_not_started();
// The resident blocks that have not come to their end.
std::vector<Block*> unfinished_blocks();

// The current thread cannot go on until set_runnable(it).
void block_current(const char* waits_for, Location where, uint32_t object = 0, uint32_t argument = 0);
void set_runnable(Thread&);
// A point where other warps may run first: randomised schedules sometimes do.
void maybe_preempt();
// Lands a TMA load of one of the resident blocks; false if none of them has any in flight.
bool deliver_in_some_block();
// Lets every other ready thread run before the current one continues.
void yield_to_others();
// Gives up on the launch: nothing of it runs any more. Does not return.
[[noreturn]] void abandon_launch();

// Grows whenever something happens that a thread in a polling loop may be waiting for.
extern uint64_t progress;

// Explains one blocked thread in a deadlock report; barriers and mbarriers add what they know.
std::string explain_wait(const Thread&);

}  // namespace emulator
