#include "deadlock.h"

#include <algorithm>

#include "barriers.h"
#include "mbarrier.h"
#include "warp_operations.h"

namespace emulator {
namespace {

// "lanes 0000ffff: barrier at file:line ...; lanes ffff0000: exited"
std::string explain_warp(const Block& block, uint32_t warp) {
  std::string line;
  char lanes[64];
  uint32_t left = 0, exited = 0;
  for (uint32_t lane = 0; lane < 32 && warp * 32 + lane < launch.num_threads; ++lane)
    (block.threads[warp * 32 + lane].exited ? exited : left) |= 1u << lane;
  while (left) {
    const Thread& thread = block.threads[warp * 32 + __builtin_ctz(left)];
    uint32_t same = 0;
    for (uint32_t mask = left; mask; mask &= mask - 1) {
      const Thread& other = block.threads[warp * 32 + __builtin_ctz(mask)];
      if (other.waits_for == thread.waits_for && same_line(other.waits_at, thread.waits_at) && other.waits_object == thread.waits_object &&
          other.waits_argument == thread.waits_argument)
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
  return line;
}

}  // namespace

std::string explain_wait(const Thread& thread) {
  std::string what = thread.waits_for ? thread.waits_for : "ready";
  what += " at " + to_string(thread.waits_at);
  return what + explain_barrier_wait(thread) + explain_mbarrier_wait(thread) + explain_warp_wait(thread);
}

// One line for each run of warps that are stuck in the same way.
void report_deadlock(Block& block) {
  running = &block;
  std::string text, previous;
  uint32_t first = 0;
  for (uint32_t w = 0; w <= launch.num_warps; ++w) {
    const std::string line = w < launch.num_warps ? explain_warp(block, w) : "";
    if (line == previous) continue;
    if (!previous.empty())
      text += "\n  " + (first + 1 == w ? "warp " + std::to_string(first) : "warps " + std::to_string(first) + "-" + std::to_string(w - 1)) +
              ": " + previous;
    previous = line;
    first = w;
  }
  const auto stuck = std::find_if(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return !thread.exited; });
  report("deadlock", stuck->waits_at, "%u of %u threads cannot make progress:%s", launch.num_threads - block.num_exited, launch.num_threads,
         text.c_str());
}

}  // namespace emulator
