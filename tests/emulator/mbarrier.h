// mbarrier: barriers in shared memory that count arrivals and bytes still expected from TMA loads.
#pragma once
#include <cstdint>

#include "race_detector.h"
#include "report.h"
#include "scheduler.h"

namespace emulator {

struct MBarrier {
  uint32_t address, count;  // arrivals per phase
  uint32_t pending;         // arrivals missing in this phase
  int64_t expected_bytes;   // the tx-count
  uint32_t phase;           // number of completed phases; its lowest bit is the parity that try_wait names
  Agent load_agent;         // the TMA loads that complete on it
  Location init_where;
  uint32_t init_thread, init_clock;
  bool fenced;  // the initialisation is visible to the async proxy
  Knowledge arriving, completed;
  std::vector<Thread*> waiters;
};

void mbarrier_init(uint32_t address, uint32_t count, Location);
void mbarrier_invalidate(uint32_t address, Location);
void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes, Location);
void mbarrier_expect_bytes(uint32_t address, uint32_t bytes, Location);
// cp.async.mbarrier.arrive: an arrival once the thread's earlier cp.async copies have landed. Without noinc it adds no arrival of its own.
void mbarrier_arrive_after_cp_async(uint32_t address, bool noinc, Location);
// Whether the phase of this parity is complete; `block`: waits until it is.
bool mbarrier_try_wait(uint32_t address, uint32_t parity, bool block, Location);
void fence_mbarrier_init(Location);
void fence_proxy_async(bool shared_memory, bool global_memory, Location);

// For TMA: the mbarrier at an address (reports and returns nullptr if there is none) and the arrival of bytes.
MBarrier* find_mbarrier(uint32_t address, const char* what, Location);
void mbarrier_receive_bytes(uint32_t address, uint32_t bytes);

void begin_block_mbarriers(Block&);
void check_mbarriers_at_end();
std::string explain_mbarrier_wait(const Thread&);

}  // namespace emulator
