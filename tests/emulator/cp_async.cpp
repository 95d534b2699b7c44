#include "cp_async.h"

#include <cstring>
#include <deque>
#include <vector>

#include "global_memory.h"
#include "global_races.h"
#include "race_detector.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace emulator {
namespace {

struct Copy {
  uint32_t offset;
  const void* source;
  uint32_t bytes, source_bytes;
};

struct Copies {  // of one thread
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
  uint32_t num_committed = 0;  // groups since the block began: the clock of the thread's cp.async agent
};

}  // namespace

struct CpAsyncCopies {
  std::vector<Copies> of_thread;
};

namespace {

Copies& own_copies() { return running->cp_async->of_thread[current->index]; }

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    end_flight(copy.offset, copy.bytes);
    memcpy(shared_memory() + copy.offset, copy.source, copy.source_bytes);
    memset(shared_memory() + copy.offset + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
}

}  // namespace

void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes, Location where) {
  Thread& self = *current;
  self.location = where;
  ++counts.cp_async;
  if (destination % bytes || uintptr_t(source) % bytes)
    report("misaligned", where, "cp.async of %u bytes from %p to shared 0x%x", bytes, source, destination);
  if (source_bytes > bytes) {
    report("cp-async", where, "cp.async of %u bytes is told that %u bytes are valid", bytes, source_bytes);
    source_bytes = bytes;
  }
  if (!shared_range_ok(destination, bytes, "cp.async", where)) return;
  if (source_bytes && !global_range_ok(source, source_bytes, "cp.async", where)) source_bytes = 0;
  if (source_bytes) check_global_access(source, source_bytes, plain_access(Effect::read), where);
  const uint32_t offset = destination - SHARED_BASE;
  if (in_flight(offset, bytes)) report("in-flight-write", where, "cp.async into smem+0x%x, which another copy is still filling", offset);
  Copies& copies = own_copies();
  if (launch.schedule.check_races) {
    const Agent agent = cp_async_agent(self.index);
    race_write(offset, bytes, access_for(self, agent, copies.num_committed + 1, false, where));
  }
  begin_flight(offset, bytes);
  copies.open.push_back({offset, source, bytes, source_bytes});
}

void cp_async_commit(Location where) {
  maybe_preempt();
  current->location = where;
  Copies& copies = own_copies();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
  ++copies.num_committed;
}

void cp_async_wait(uint32_t groups_left, Location where) {
  maybe_preempt();
  current->location = where;
  Copies& copies = own_copies();
  while (copies.committed.size() > groups_left) {
    land(copies.committed.front());
    copies.committed.pop_front();
  }
  set_seen(*current, cp_async_agent(current->index), copies.num_committed - uint32_t(copies.committed.size()));
}

uint32_t cp_async_land_all(Location where) {
  current->location = where;
  Copies& copies = own_copies();
  for (auto& group : copies.committed) {
    land(group);
    group.clear();
  }
  land(copies.open);
  copies.open.clear();
  return copies.num_committed + 1;
}

void begin_block_cp_async(Block& block) {
  block.cp_async = std::make_shared<CpAsyncCopies>();
  block.cp_async->of_thread.resize(launch.num_threads);
}

void check_cp_async_at_exit() {
  const Copies& copies = own_copies();
  bool pending = !copies.open.empty();
  for (const auto& group : copies.committed) pending |= !group.empty();
  if (pending) report("exit-pending", current->location, "the thread exits with cp.async copies that it never waited for");
}

}  // namespace emulator
