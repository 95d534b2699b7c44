#include "polling.h"

#include <string>

#include "global_memory.h"
#include "shared_memory.h"
#include "tma.h"

namespace emulator {
namespace {

struct Poll {  // the last one of a thread
  const void* address = nullptr;
  uint64_t value = 0;
  uint64_t progress = 0;  // when it found something new
  uint32_t count = 0;     // since then
  Location where = 0;
};

constexpr uint32_t MAX_POLLS = 20'000;

}  // namespace

struct Polls {
  std::vector<Poll> of_thread;
};

namespace {

std::string name_of_place(const void* address) {
  const uint64_t offset = uint64_t(address) - uint64_t(shared_memory());
  return offset < shared_size() ? "smem+" + std::to_string(offset) : name_of_global(address);
}

// "block (3, 0, 0): 1 threads poll argument 0+8 at file:line, 31 wait at file:line (barrier)"
std::string explain_block(const Block& block) {
  uint32_t polling = 0, waiting = 0;
  const Thread *poller = nullptr, *waiter = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.exited) continue;
    const bool is_blocked = thread.waits_for != nullptr;
    (is_blocked ? waiting : polling) += 1;
    (is_blocked ? waiter : poller) = &thread;
  }
  std::string text =
      "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + "):";
  if (poller) {
    const Poll& poll = block.polls->of_thread[poller->index];
    text += " " + std::to_string(polling) + " threads poll " + name_of_place(poll.address) + " at " + to_string(poll.where);
  }
  if (waiter)
    text += std::string(poller ? "," : "") + " " + std::to_string(waiting) + " threads wait: " + waiter->waits_for + " at " +
            to_string(waiter->waits_at);
  return text;
}

[[noreturn]] void report_livelock(const Poll& poll) {
  constexpr size_t MAX_BLOCKS = 8;
  const std::vector<Block*> blocks = unfinished_blocks();
  std::string text;
  for (size_t i = 0; i < blocks.size() && i < MAX_BLOCKS; ++i) text += "\n  " + explain_block(*blocks[i]);
  if (blocks.size() > MAX_BLOCKS) text += "\n  and " + std::to_string(blocks.size() - MAX_BLOCKS) + " more resident blocks";
  if (blocks_not_started())
    text += "\n  " + std::to_string(blocks_not_started()) + " of " + std::to_string(launch.num_blocks) +
            " blocks have not started and cannot become resident before one of these ends: the schedule has room for " +
            std::to_string(launch.resident_blocks);
  report("livelock", poll.where, "polls %s, which keeps the value 0x%llx: nobody is left who could change it%s",
         name_of_place(poll.address).c_str(), (unsigned long long)poll.value, text.c_str());
  abandon_launch();
}

}  // namespace

void note_poll(const void* address, uint64_t value, Location where) {
  Poll& poll = running->polls->of_thread[current->index];
  if (poll.address != address || poll.value != value || poll.where != where) {
    poll = {address, value, progress, 0, where};
    return;
  }
  if (poll.progress != progress) {
    poll.progress = progress;
    poll.count = 0;
  } else if (++poll.count > MAX_POLLS) {
    report_livelock(poll);
  }
  // Copies in flight land when nobody else can run, and somebody who polls always can.
  if (poll.count % 16 == 15) deliver_in_some_block();
  yield_to_others();
}

void begin_block_polls(Block& block) {
  block.polls = std::make_shared<Polls>();
  block.polls->of_thread.resize(launch.num_threads);
}

}  // namespace emulator
