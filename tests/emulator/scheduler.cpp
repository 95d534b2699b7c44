#include "scheduler.h"

#include <algorithm>

#include "barriers.h"
#include "cp_async.h"
#include "mbarrier.h"
#include "race_detector.h"
#include "shared_memory.h"
#include "tma.h"
#include "warp_operations.h"
#include "wgmma.h"

namespace emulator {

Launch launch;
Counts counts;
std::vector<Thread> threads;
Thread* current;

namespace {

struct Warp {
  uint32_t runnable = 0;  // lanes
  uint32_t priority = 0;
};

std::vector<Warp> warps;
uint32_t ready_warps;  // bit set of warps with a runnable lane
uint32_t current_warp;
uint32_t num_exited;
Fiber main_fiber;
void (*thread_body)();
uint64_t random_state;

uint32_t lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

void clear_runnable(Thread& thread) {
  Warp& warp = warps[thread.warp];
  warp.runnable &= ~(1u << thread.lane);
  if (!warp.runnable) ready_warps &= ~(1u << thread.warp);
}

uint32_t next_warp() {
  uint32_t mask = ready_warps, best;
  switch (launch.schedule.order) {
    case WarpOrder::random:
      for (uint32_t skip = random_number() % __builtin_popcount(mask); skip; --skip) mask &= mask - 1;
      return lowest_bit(mask);
    case WarpOrder::priority:
      best = lowest_bit(mask);
      for (mask &= mask - 1; mask; mask &= mask - 1)
        if (warps[lowest_bit(mask)].priority < warps[best].priority) best = lowest_bit(mask);
      return best;
    default:
      best = current_warp;
      do best = (best + 1) % launch.num_warps;
      while (!(mask >> best & 1));
      return best;
  }
}

// The thread that runs next; nullptr if none can and no copy in flight could wake one.
Thread* pick_thread() {
  for (;;) {
    if (launch.schedule.delivery == Delivery::random && random_number() % 4 == 0) deliver_tma_load();
    if (!warps[current_warp].runnable) {
      if (!ready_warps) {
        if (deliver_tma_load()) continue;
        return nullptr;
      }
      current_warp = next_warp();
    }
    return &threads[current_warp * 32 + lowest_bit(warps[current_warp].runnable)];
  }
}

void switch_to(Fiber& from, Thread* next) {
  ++counts.switches;
  current = next;
  switch_fiber(from, next ? next->fiber : main_fiber);
}

void run_others() {
  Thread* self = current;
  Thread* next = pick_thread();
  if (next != self) switch_to(self->fiber, next);
}

void thread_main() {
  thread_body();
  Thread& self = *current;
  self.exited = true;
  ++num_exited;
  clear_runnable(self);
  check_cp_async_at_exit();
  check_tma_stores_at_exit();
  check_wgmma_at_exit();
  switch_to(self.fiber, pick_thread());
  __builtin_unreachable();
}

// One line for each run of warps that are stuck in the same way.
void report_deadlock() {
  const uint32_t num_threads = launch.num_threads;
  std::string text;
  std::string previous;
  uint32_t first = 0;
  for (uint32_t w = 0; w <= launch.num_warps; ++w) {
    std::string line;
    if (w < launch.num_warps) {
      uint32_t left = 0, exited = 0;
      for (uint32_t lane = 0; lane < 32 && w * 32 + lane < num_threads; ++lane)
        (threads[w * 32 + lane].exited ? exited : left) |= 1u << lane;
      char lanes[64];
      while (left) {
        const Thread& thread = threads[w * 32 + lowest_bit(left)];
        uint32_t same = 0;
        for (uint32_t mask = left; mask; mask &= mask - 1) {
          const Thread& other = threads[w * 32 + lowest_bit(mask)];
          if (other.waits_for == thread.waits_for && same_line(other.waits_at, thread.waits_at) &&
              other.waits_object == thread.waits_object && other.waits_argument == thread.waits_argument)
            same |= mask & -mask;
        }
        left &= ~same;
        snprintf(lanes, sizeof lanes, "%slanes %08x: ", line.empty() ? "" : "; ", same);
        line += lanes + explain_wait(thread);
      }
      if (exited) {
        snprintf(lanes, sizeof lanes, "%slanes %08x: exited", line.empty() ? "" : "; ", exited);
        line += lanes;
      }
    }
    if (line == previous) continue;
    if (!previous.empty())
      text += "\n  " + (first + 1 == w ? "warp " + std::to_string(first) : "warps " + std::to_string(first) + "-" + std::to_string(w - 1)) +
              ": " + previous;
    previous = line;
    first = w;
  }
  auto stuck = std::find_if(threads.begin(), threads.end(), [](const Thread& thread) { return !thread.exited; });
  report("deadlock", stuck->waits_at, "%u of %u threads cannot make progress:%s", num_threads - num_exited, num_threads, text.c_str());
}

bool abandoned;

}  // namespace

uint32_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16);
}

void seed_random_numbers(uint64_t seed) { random_state = 0x9E3779B97F4A7C15ull ^ (seed * 0xD1342543DE82EF95ull + 1); }

void set_runnable(Thread& thread) {
  warps[thread.warp].runnable |= 1u << thread.lane;
  ready_warps |= 1u << thread.warp;
  thread.waits_for = nullptr;
}

void block_current(const char* waits_for, Location where, uint32_t object, uint32_t argument) {
  current->waits_for = waits_for;
  current->waits_at = where;
  current->waits_object = object;
  current->waits_argument = argument;
  clear_runnable(*current);
  run_others();
}

void maybe_preempt() {
  if (launch.schedule.order == WarpOrder::round_robin || random_number() % 4) return;
  Thread& self = *current;
  clear_runnable(self);
  Thread* next = nullptr;
  if (ready_warps) {
    current_warp = (current_warp + 1 + random_number() % launch.num_warps) % launch.num_warps;
    next = pick_thread();
  }
  set_runnable(self);
  if (next && next != &self) switch_to(self.fiber, next);
}

void yield_to_others() {
  Thread& self = *current;
  clear_runnable(self);
  Thread* next = ready_warps ? pick_thread() : nullptr;
  set_runnable(self);
  if (next && next != &self) switch_to(self.fiber, next);
}

void abandon_block() {
  abandoned = true;
  switch_to(current->fiber, nullptr);
  __builtin_unreachable();
}

std::string explain_wait(const Thread& thread) {
  std::string what = thread.waits_for ? thread.waits_for : "ready";
  what += " at " + to_string(thread.waits_at);
  return what + explain_barrier_wait(thread) + explain_mbarrier_wait(thread) + explain_warp_wait(thread);
}

bool run_block(Dim3 index, void (*body)()) {
  launch.block_index = index;
  thread_body = body;
  abandoned = false;
  num_exited = current_warp = ready_warps = 0;
  warps.assign(launch.num_warps, Warp());
  for (Warp& warp : warps) warp.priority = random_number();
  threads.assign(launch.num_threads, Thread());
  for (uint32_t i = 0; i < launch.num_threads; ++i) {
    Thread& thread = threads[i];
    thread.index = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    thread.thread_index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
    thread.fiber = new_fiber(i, thread_main);
    set_runnable(thread);
  }
  begin_block_shared_memory();
  begin_block_races();
  begin_block_warp_operations();
  begin_block_barriers();
  begin_block_mbarriers();
  begin_block_cp_async();
  begin_block_tma();
  begin_block_wgmma();
  switch_to(main_fiber, pick_thread());
  current = nullptr;
  if (abandoned) return false;
  if (num_exited < launch.num_threads) {
    report_deadlock();
    return false;
  }
  check_tma_loads_at_end();
  check_mbarriers_at_end();
  return true;
}

}  // namespace emulator
