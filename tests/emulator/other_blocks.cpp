#include "other_blocks.h"

#include <algorithm>
#include <unordered_map>

#include "race_detector.h"

namespace emulator {
namespace {

struct Fences {           // of one thread
  OtherBlocks published;  // what its last fence makes strong writes after it publish
  OtherBlocks read;       // what its strong reads have found since, which the next fence acquires
  OtherBlocks received;   // by its last acquire: pollers find the same again and again
  uint32_t clock = 0;     // at the last fence; 0: none
};

std::unordered_map<uint64_t, OtherBlocks> published_at;  // by the address of the value that carries it
uint64_t lowest_address, highest_address;                // of those

OtherBlocks found_at(uint64_t address) {
  const auto entry = published_at.find(address);
  return entry == published_at.end() ? nullptr : entry->second;
}

void publish_at(uint64_t address, OtherBlocks knowledge) {
  lowest_address = std::min(lowest_address, address);
  highest_address = std::max(highest_address, address);
  published_at[address] = std::move(knowledge);
}

bool all_at_least(const Clocks& a, const Clocks& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] < b[i]) return false;
  return true;
}

std::shared_ptr<const Clocks> joined(const std::shared_ptr<const Clocks>& a, const std::shared_ptr<const Clocks>& b) {
  if (a == b || all_at_least(*a, *b)) return a;
  if (all_at_least(*b, *a)) return b;
  auto both = std::make_shared<Clocks>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

OtherBlocks merged(const OtherBlocks& a, const OtherBlocks& b) {
  auto both = std::make_shared<std::vector<BlockClocks>>();
  both->reserve(std::max(a->size(), b->size()));
  bool is_a = true, is_b = true;
  for (auto x = a->begin(), y = b->begin(); x != a->end() || y != b->end();) {
    if (y == b->end() || (x != a->end() && x->block < y->block)) {
      both->push_back(*x++);
      is_b = false;
    } else if (x == a->end() || y->block < x->block) {
      both->push_back(*y++);
      is_a = false;
    } else {
      both->push_back({x->block, joined(x->clocks, y->clocks)});
      is_a &= both->back().clocks == x->clocks;
      is_b &= both->back().clocks == y->clocks;
      ++x, ++y;
    }
  }
  return is_a ? a : is_b ? b : both;
}

}  // namespace

struct MemoryOrder {
  std::vector<Fences> of_thread;
};

namespace {

Fences& fences_of(const Thread& thread) { return thread.block->memory_order->of_thread[thread.index]; }

}  // namespace

OtherBlocks joined(const OtherBlocks& a, const OtherBlocks& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  // All threads of a block join the same two when they leave a barrier.
  static OtherBlocks last_a, last_b, last_result;
  if (a != last_a || b != last_b) {
    last_result = merged(a, b);
    last_a = a, last_b = b;
  }
  return last_result;
}

bool includes(const OtherBlocks& knowledge, uint32_t block, uint32_t agent, uint32_t clock) {
  if (!knowledge) return false;
  const auto entry = std::lower_bound(knowledge->begin(), knowledge->end(), block,
                                      [](const BlockClocks& known, uint32_t number) { return known.block < number; });
  return entry != knowledge->end() && entry->block == block && (*entry->clocks)[agent] >= clock;
}

void strong_read(uint64_t address, Order order) {
  if (!launch.schedule.check_races) return;
  const OtherBlocks found = found_at(address);
  if (!found) return;
  Fences& fences = fences_of(*current);
  if (!acquires(order)) {
    join(fences.read, found);
  } else if (found != fences.received) {
    receive(*current, found);
    fences.received = found;
  }
}

void strong_write(uint64_t address, Order order) {
  if (!launch.schedule.check_races) return;
  const OtherBlocks knowledge = releases(order) ? publish(*current) : fences_of(*current).published;
  if (knowledge)
    publish_at(address, knowledge);
  else
    published_at.erase(address);
}

void strong_update(uint64_t address, Order order, bool writes) {
  if (!launch.schedule.check_races) return;
  strong_read(address, order);
  if (!writes) return;
  // The value still carries what was published with those that it was made of.
  const OtherBlocks knowledge = joined(found_at(address), releases(order) ? publish(*current) : fences_of(*current).published);
  if (knowledge) publish_at(address, knowledge);
}

void weak_write(uint64_t address, uint32_t bytes) {
  if (published_at.empty() || address > highest_address || address + bytes <= lowest_address) return;
  for (uint64_t i = address; i < address + bytes; ++i) published_at.erase(i);
}

void fence_gpu_scope(Location where) {
  maybe_preempt();
  current->location = where;
  if (!launch.schedule.check_races) return;
  Fences& fences = fences_of(*current);
  if (fences.read) receive(*current, fences.read);
  fences.read = nullptr;
  fences.clock = own_clock(*current);
  fences.published = publish(*current);
}

uint32_t strong_clock(const Thread& thread, Order order) {
  if (!launch.schedule.check_races) return 0;
  const Fences& fences = fences_of(thread);
  return fences.clock && !releases(order) ? fences.clock : own_clock(thread);
}

void begin_launch_other_blocks() {
  published_at.clear();
  lowest_address = ~0ull;
  highest_address = 0;
}

void begin_block_other_blocks(Block& block) {
  block.memory_order = std::make_shared<MemoryOrder>();
  block.memory_order->of_thread.resize(launch.num_threads);
}

}  // namespace emulator
