#include "scheduler.h"

#include <algorithm>

#include "barriers.h"
#include "cp_async.h"
#include "deadlock.h"
#include "global_races.h"
#include "mbarrier.h"
#include "other_blocks.h"
#include "polling.h"
#include "ptx_interpreter.h"
#include "race_detector.h"
#include "shared_memory.h"
#include "tma.h"
#include "warp_operations.h"
#include "wgmma.h"

namespace emulator {

Launch launch;
Counts counts;
Block* running;
Thread* current;
uint64_t progress;

namespace {

std::vector<std::unique_ptr<Block>> blocks;  // by slot
const std::vector<uint64_t>* block_order;
uint64_t num_started;
uint32_t current_slot, current_warp;
Fiber main_fiber;
void (*thread_body)();
bool abandoned;
uint64_t random_state;
uint64_t last_priority;  // of the warps that had to yield, below those of all others

uint32_t lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

void make_ready(Thread& thread) {
  thread.block->warps[thread.warp].runnable |= 1u << thread.lane;
  thread.block->ready_warps |= 1u << thread.warp;
}

void clear_runnable(Thread& thread) {
  Warp& warp = thread.block->warps[thread.warp];
  warp.runnable &= ~(1u << thread.lane);
  if (!warp.runnable) thread.block->ready_warps &= ~(1u << thread.warp);
}

bool any_ready() {
  for (const auto& block : blocks)
    if (block->ready_warps) return true;
  return false;
}

uint32_t num_ready_warps() {
  uint32_t count = 0;
  for (const auto& block : blocks) count += __builtin_popcount(block->ready_warps);
  return count;
}

// Chooses among the ready warps of all resident blocks, of which there is at least one.
void choose_warp() {
  if (launch.schedule.order == WarpOrder::round_robin) {  // the next one after the current, block by block
    uint32_t later = blocks[current_slot]->ready_warps & ~((2ull << current_warp) - 1);
    while (!later) {
      current_slot = (current_slot + 1) % blocks.size();
      later = blocks[current_slot]->ready_warps;
    }
    current_warp = lowest_bit(later);
    return;
  }
  const bool by_priority = launch.schedule.order == WarpOrder::priority;
  uint32_t skip = by_priority ? 0 : random_number() % num_ready_warps();
  const Warp* best = nullptr;
  for (const auto& block : blocks)
    for (uint32_t mask = block->ready_warps; mask; mask &= mask - 1) {
      const Warp& warp = block->warps[lowest_bit(mask)];
      if (by_priority ? best && warp.priority >= best->priority : skip-- != 0) continue;
      best = &warp;
      current_slot = block->slot;
      current_warp = lowest_bit(mask);
      if (!by_priority) return;
    }
}

// The thread that runs next; nullptr if none can and no copy in flight could wake one.
Thread* pick_thread() {
  for (;;) {
    if (launch.schedule.delivery == Delivery::random && random_number() % 4 == 0) deliver_in_some_block();
    if (!blocks[current_slot]->warps[current_warp].runnable) {
      if (!any_ready()) {
        if (deliver_in_some_block()) continue;
        return nullptr;
      }
      choose_warp();
    }
    Block& block = *blocks[current_slot];
    return &block.threads[current_warp * 32 + lowest_bit(block.warps[current_warp].runnable)];
  }
}

void switch_to(Fiber& from, Thread* next) {
  ++counts.switches;
  current = next;
  if (next) running = next->block;
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
  ++progress;
  clear_runnable(self);
  check_cp_async_at_exit();
  check_tma_stores_at_exit();
  check_wgmma_at_exit();
  // The block's last thread leaves to the main fiber, which puts another block in its place.
  const bool was_last = ++self.block->num_exited == launch.num_threads;
  switch_to(self.fiber, was_last ? nullptr : pick_thread());
  __builtin_unreachable();
}

void start_block(Block& block, uint64_t number) {
  const Dim3 grid = launch.grid;
  block.number = uint32_t(number);
  block.index = {uint32_t(number % grid.x), uint32_t(number / grid.x % grid.y), uint32_t(number / (uint64_t(grid.x) * grid.y))};
  block.num_exited = block.ready_warps = 0;
  block.warps.assign(launch.num_warps, Warp());
  for (Warp& warp : block.warps) warp.priority = random_number();
  block.threads.assign(launch.num_threads, Thread());
  for (uint32_t i = 0; i < launch.num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    thread.thread_index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
    thread.fiber = new_fiber(size_t(block.slot) * launch.num_threads + i, thread_main);
    make_ready(thread);
  }
  begin_block_shared_memory(block);
  begin_block_races(block);
  begin_block_warp_operations(block);
  begin_block_barriers(block);
  begin_block_mbarriers(block);
  begin_block_cp_async(block);
  begin_block_tma(block);
  begin_block_wgmma(block);
  begin_block_other_blocks(block);
  begin_block_global_accesses(block);
  begin_block_polls(block);
  begin_ptx_block(block);
  ++progress;
}

// False: no block is left.
bool start_next_block(Block& block) {
  if (num_started == block_order->size()) return false;
  start_block(block, (*block_order)[num_started++]);
  return true;
}

void finish_block(Block& block) {
  running = &block;
  check_tma_loads_at_end();
  check_mbarriers_at_end();
}

bool is_finished(const Block& block) { return block.num_exited == launch.num_threads; }

}  // namespace

uint32_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16);
}

void seed_random_numbers(uint64_t seed) { random_state = 0x9E3779B97F4A7C15ull ^ (seed * 0xD1342543DE82EF95ull + 1); }

void set_runnable(Thread& thread) {
  make_ready(thread);
  thread.waits_for = nullptr;
  ++progress;
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
  if (any_ready()) {
    const uint32_t num_warps = launch.num_warps;
    const uint64_t place = current_slot * num_warps + current_warp + 1 + random_number() % (blocks.size() * num_warps);
    current_slot = uint32_t(place / num_warps % blocks.size());
    current_warp = uint32_t(place % num_warps);
    next = pick_thread();
  }
  make_ready(self);
  if (next && next != &self) switch_to(self.fiber, next);
}

void yield_to_others() {
  Thread& self = *current;
  Warp& warp = self.block->warps[self.warp];
  warp.priority = ++last_priority;
  const uint32_t later_lanes = warp.runnable & ~((2ull << self.lane) - 1);
  if (later_lanes) {
    switch_to(self.fiber, &self.block->threads[self.warp * 32 + lowest_bit(later_lanes)]);
    return;
  }
  choose_warp();
  Thread* next = pick_thread();
  if (next != &self) switch_to(self.fiber, next);
}

bool deliver_in_some_block() {
  Block* const running_before = running;
  Thread* const current_before = current;
  const size_t first = blocks.size() > 1 ? random_number() % blocks.size() : 0;
  bool delivered = false;
  for (size_t i = 0; i < blocks.size() && !delivered; ++i) {
    running = blocks[(first + i) % blocks.size()].get();
    if (running != running_before) current = nullptr;  // reports concern the other block as a whole
    delivered = deliver_tma_load();
    current = current_before;
  }
  running = running_before;
  return delivered;
}

void abandon_launch() {
  abandoned = true;
  switch_to(current->fiber, nullptr);
  __builtin_unreachable();
}

uint64_t blocks_not_started() { return block_order->size() - num_started; }

std::vector<Block*> unfinished_blocks() {
  std::vector<Block*> unfinished;
  for (const auto& block : blocks)
    if (!is_finished(*block)) unfinished.push_back(block.get());
  return unfinished;
}

void run_blocks(const std::vector<uint64_t>& order, void (*body)()) {
  thread_body = body;
  block_order = &order;
  num_started = progress = 0;
  last_priority = 1ull << 32;
  current_slot = current_warp = 0;
  abandoned = false;
  // Blocks are kept from launch to launch, since what they hold takes time to allocate.
  blocks.resize(std::min<uint64_t>(launch.resident_blocks, order.size()));
  for (size_t slot = 0; slot < blocks.size(); ++slot) {
    if (!blocks[slot]) blocks[slot] = std::make_unique<Block>();
    blocks[slot]->slot = uint32_t(slot);
    start_next_block(*blocks[slot]);
  }
  for (;;) {
    Thread* next = pick_thread();
    if (!next) break;
    switch_to(main_fiber, next);
    current = nullptr;
    if (abandoned || too_many_findings()) break;
    for (const auto& block : blocks) {
      if (!is_finished(*block) || block->threads.empty()) continue;
      finish_block(*block);
      block->threads.clear();
      if (start_next_block(*block)) {
        current_slot = block->slot;
        current_warp = 0;
      }
    }
  }
  current = nullptr;
  if (!abandoned && !too_many_findings())
    for (Block* block : unfinished_blocks()) report_deadlock(*block);
  for (const auto& block : blocks) block->ptx.reset();  // frees what threads held that did not come to their end
  running = nullptr;
}

}  // namespace emulator
