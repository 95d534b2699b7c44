#include "barriers.h"

#include <utility>

#include "race_detector.h"

namespace emulator {
namespace {

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  std::vector<Thread*> waiters;
  Knowledge knowledge;
  Location where = 0;
  BarrierVotes votes, last_votes;
};

constexpr uint32_t NUM_BARRIERS = 16;
constexpr const char* WAITING = "barrier";

}  // namespace

struct Barriers {
  Barrier of_number[NUM_BARRIERS];
};

namespace {

void arrive(uint32_t number, uint32_t num_threads, bool wait, bool predicate, Location where) {
  Thread& self = *current;
  self.location = where;
  if (number >= NUM_BARRIERS) report("barrier", where, "barrier %u does not exist: there are %u", number, NUM_BARRIERS);
  if (num_threads == WHOLE_BLOCK)
    num_threads = launch.num_threads;
  else if (num_threads % 32)
    report("barrier", where, "barrier %u: %u threads is not a multiple of the warp size", number, num_threads);
  Barrier& barrier = running->barriers->of_number[number % NUM_BARRIERS];
  if (barrier.arrived == 0) {
    barrier.expected = num_threads;
    barrier.votes = BarrierVotes();
    clear(barrier.knowledge);
  } else if (barrier.expected != num_threads) {
    report("barrier", where, "barrier %u: %u threads here, %u at %s", number, num_threads, barrier.expected,
           to_string(barrier.where).c_str());
  }
  barrier.where = where;
  barrier.votes.count += predicate;
  barrier.votes.any |= predicate;
  barrier.votes.all &= predicate;
  release(self, barrier.knowledge);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.last_votes = barrier.votes;
    const std::vector<Thread*> waiters = std::exchange(barrier.waiters, {});
    for (Thread* waiter : waiters) {
      acquire(*waiter, barrier.knowledge);
      set_runnable(*waiter);
    }
    if (wait) acquire(self, barrier.knowledge);
  } else if (wait) {
    barrier.waiters.push_back(&self);
    block_current(WAITING, where, number % NUM_BARRIERS, num_threads);
  }
}

}  // namespace

BarrierVotes barrier_sync(uint32_t number, uint32_t num_threads, Location where, bool predicate) {
  arrive(number, num_threads, true, predicate, where);
  return running->barriers->of_number[number % NUM_BARRIERS].last_votes;
}

void barrier_arrive(uint32_t number, uint32_t num_threads, Location where) { arrive(number, num_threads, false, false, where); }

void begin_block_barriers(Block& block) {
  if (!block.barriers) block.barriers = std::make_shared<Barriers>();
  for (Barrier& barrier : block.barriers->of_number) {
    barrier.arrived = 0;
    barrier.waiters.clear();
  }
}

std::string explain_barrier_wait(const Thread& thread) {
  if (thread.waits_for != WAITING) return "";
  const Barrier& barrier = thread.block->barriers->of_number[thread.waits_object];
  return " -- barrier " + std::to_string(thread.waits_object) + ": " + std::to_string(barrier.arrived) + " of " +
         std::to_string(barrier.expected) + " threads arrived";
}

}  // namespace emulator
