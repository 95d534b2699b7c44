#include "mbarrier.h"

#include <map>
#include <utility>

#include "cp_async.h"
#include "shared_memory.h"
#include "tma.h"

namespace emulator {

struct MBarriers {
  std::map<uint32_t, MBarrier> at;  // by address
  std::vector<uint32_t> spins_of;   // by thread: polls that failed since a phase last completed anywhere
};

namespace {

constexpr uint32_t MAX_SPINS = 20'000;
constexpr const char* WAITING = "mbarrier wait";

void complete_phases(MBarrier& barrier) {
  while (barrier.pending == 0 && barrier.expected_bytes == 0) {
    check_no_load_pending(barrier);
    barrier.pending = barrier.count;
    ++barrier.phase;
    set_seen(barrier.arriving, barrier.load_agent, barrier.phase);
    if (launch.schedule.check_races) barrier.completed = barrier.arriving;
    for (Thread* waiter : std::exchange(barrier.waiters, {})) {
      if ((barrier.phase & 1) == waiter->waits_argument) {
        barrier.waiters.push_back(waiter);
        continue;
      }
      acquire(*waiter, barrier.completed);
      set_runnable(*waiter);
    }
    running->mbarriers->spins_of.assign(launch.num_threads, 0);
    if (barrier.count == 0) break;
  }
}

void fence_own_inits() {
  for (auto& [address, barrier] : running->mbarriers->at)
    if (barrier.init_thread == current->index) barrier.fenced = true;
}

void arrive(MBarrier& barrier, uint32_t count, Location where) {
  if (barrier.pending < count) {
    report("mbarrier", where, "more arrivals than the count %u of mbarrier smem+0x%x in phase %u", barrier.count,
           barrier.address - SHARED_BASE, barrier.phase);
    return;
  }
  barrier.pending -= count;
  complete_phases(barrier);
}

}  // namespace

MBarrier* find_mbarrier(uint32_t address, const char* what, Location where) {
  current->location = where;
  const auto entry = running->mbarriers->at.find(address);
  if (entry == running->mbarriers->at.end()) {
    report("mbarrier", where, "%s on smem+0x%x, which is not an initialised mbarrier", what, address - SHARED_BASE);
    return nullptr;
  }
  MBarrier& barrier = entry->second;
  if (barrier.init_thread != current->index && seen(*current, barrier.init_thread) < barrier.init_clock) {
    report("race", where, "%s on mbarrier smem+0x%x is not ordered after its initialisation at %s", what, address - SHARED_BASE,
           to_string(barrier.init_where).c_str());
    barrier.init_clock = 0;
  }
  return &barrier;
}

void mbarrier_init(uint32_t address, uint32_t count, Location where) {
  current->location = where;
  if (address % 8) report("misaligned", where, "mbarrier 0x%x is not a multiple of 8 bytes", address);
  if (!shared_range_ok(address, 8, "mbarrier.init", where)) return;
  MBarrier barrier{};
  barrier.address = address;
  barrier.count = barrier.pending = count;
  barrier.load_agent = new_tma_load_agent(where);
  barrier.init_where = where;
  barrier.init_thread = current->index;
  barrier.init_clock = own_clock(*current);
  clear(barrier.arriving);
  clear(barrier.completed);
  running->mbarriers->at[address] = barrier;
}

void mbarrier_invalidate(uint32_t address, Location where) {
  if (find_mbarrier(address, "mbarrier.inval", where)) running->mbarriers->at.erase(address);
}

void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes, Location where) {
  maybe_preempt();
  MBarrier* barrier = find_mbarrier(address, "mbarrier.arrive", where);
  if (!barrier) return;
  barrier->expected_bytes += expected_bytes;
  release(*current, barrier->arriving);
  arrive(*barrier, count, where);
}

void mbarrier_expect_bytes(uint32_t address, uint32_t bytes, Location where) {
  if (MBarrier* barrier = find_mbarrier(address, "mbarrier.expect_tx", where)) barrier->expected_bytes += bytes;
}

void mbarrier_arrive_after_cp_async(uint32_t address, bool noinc, Location where) {
  MBarrier* barrier = find_mbarrier(address, "cp.async.mbarrier.arrive", where);
  if (!barrier) return;
  const uint32_t clock = cp_async_land_all(where);
  set_seen(barrier->arriving, cp_async_agent(current->index), clock);
  if (noinc) arrive(*barrier, 1, where);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, bool block, Location where) {
  maybe_preempt();
  MBarrier* barrier = find_mbarrier(address, "mbarrier.try_wait", where);
  if (!barrier) return true;
  if (parity > 1) report("mbarrier", where, "phase parity %u is neither 0 nor 1", parity);
  if ((barrier->phase & 1) != parity) {
    acquire(*current, barrier->completed);
    return true;
  }
  if (block) {
    barrier->waiters.push_back(current);
    block_current(WAITING, where, address, parity);
    return true;
  }
  uint32_t& spins = running->mbarriers->spins_of[current->index];
  if (++spins > MAX_SPINS) {
    report("livelock", where, "polls mbarrier smem+0x%x for parity %u without progress", address - SHARED_BASE, parity);
    block_current(WAITING, where, address, parity);
  }
  if (spins % 16 == 0) deliver_tma_load();
  yield_to_others();
  return false;
}

void fence_mbarrier_init(Location where) {
  current->location = where;
  fence_own_inits();
}

void fence_proxy_async(bool shared_memory, bool global_memory, Location where) {
  maybe_preempt();
  current->location = where;
  if (shared_memory) fence_own_inits();
  fence_async_proxy(*current, shared_memory, global_memory);
}

void mbarrier_receive_bytes(uint32_t address, uint32_t bytes) {
  const auto entry = running->mbarriers->at.find(address);
  if (entry == running->mbarriers->at.end()) return;
  entry->second.expected_bytes -= bytes;
  complete_phases(entry->second);
}

void begin_block_mbarriers(Block& block) {
  block.mbarriers = std::make_shared<MBarriers>();
  block.mbarriers->spins_of.assign(launch.num_threads, 0);
}

void check_mbarriers_at_end() {
  for (const auto& [address, barrier] : running->mbarriers->at)
    if (barrier.expected_bytes != 0)
      report("tx-count", barrier.init_where, "the block ends with tx-count %lld on the mbarrier initialised here",
             (long long)barrier.expected_bytes);
}

std::string explain_mbarrier_wait(const Thread& thread) {
  const auto entry = running->mbarriers->at.find(thread.waits_object);
  if (thread.waits_for != WAITING || entry == running->mbarriers->at.end()) return "";
  const MBarrier& barrier = entry->second;
  char text[256];
  snprintf(text, sizeof text,
           " -- mbarrier smem+0x%x (initialised at %s) waits for parity %u; is in phase %u (parity %u), %u of %u arrivals missing, "
           "tx-count %lld",
           barrier.address - SHARED_BASE, to_string(barrier.init_where).c_str(), thread.waits_argument, barrier.phase, barrier.phase & 1,
           barrier.pending, barrier.count, (long long)barrier.expected_bytes);
  return text;
}

}  // namespace emulator
