#include "global_races.h"

#include <algorithm>
#include <string>

#include "global_memory.h"

namespace emulator {
namespace {

// Accesses that are alike: each byte of global memory names one for its last write and one for its last read.
struct Epoch {
  GlobalAccess access;
  uint32_t block;
  Location where;
  uint32_t fence_clock;  // of the thread's first fence.proxy.async after it; 0: none
};
bool same(const GlobalAccess& a, const GlobalAccess& b) {
  return a.effect == b.effect && a.strong == b.strong && a.async_proxy == b.async_proxy && a.agent == b.agent && a.clock == b.clock;
}

using EpochIndex = uint32_t;  // 0: none
std::vector<Epoch> epochs;
constexpr size_t MIN_EPOCHS = 1 << 18;
size_t max_epochs;  // beyond it those that no byte names any more are dropped

struct Recent {  // of one thread
  EpochIndex read = 0, write = 0;
  std::vector<EpochIndex> unfenced;  // writes since its last fence.proxy.async for global memory
};

}  // namespace

struct GlobalAccesses {
  std::vector<Recent> of_thread;
};

namespace {

void drop_unused_epochs() {
  std::vector<EpochIndex> new_index(epochs.size(), 0);
  for (const Region& region : global_regions())
    for (const auto* shadow : {&region.writers, &region.readers})
      for (EpochIndex i : *shadow) new_index[i] = 1;
  EpochIndex count = 1;
  for (EpochIndex i = 1; i < epochs.size(); ++i) {
    if (!new_index[i]) continue;
    epochs[count] = epochs[i];
    new_index[i] = count++;
  }
  new_index[0] = 0;
  epochs.resize(count);
  for (Region& region : global_regions())
    for (auto* shadow : {&region.writers, &region.readers})
      for (EpochIndex& i : *shadow) i = new_index[i];
  for (Block* block : unfinished_blocks())
    for (Recent& recent : block->global->of_thread) {
      recent.read = recent.write = 0;
      for (EpochIndex& i : recent.unfenced) i = new_index[i];
      recent.unfenced.erase(std::remove(recent.unfenced.begin(), recent.unfenced.end(), 0), recent.unfenced.end());
    }
  max_epochs = std::max(MIN_EPOCHS, 2 * epochs.size());
}

EpochIndex epoch_of(const GlobalAccess& access, Location where) {
  Recent& recent = running->global->of_thread[current->index];
  EpochIndex& last = access.effect == Effect::read ? recent.read : recent.write;
  if (last && epochs[last].where == where && same(epochs[last].access, access)) return last;
  if (epochs.size() > max_epochs) drop_unused_epochs();
  last = EpochIndex(epochs.size());
  epochs.push_back({access, running->number, where, 0});
  if (access.effect != Effect::read && !access.async_proxy) recent.unfenced.push_back(last);
  return last;
}

const char* verb(Effect effect) { return effect == Effect::read ? "reads" : effect == Effect::write ? "writes" : "adds to"; }
const char* noun(Effect effect) { return effect == Effect::read ? "read" : effect == Effect::write ? "write" : "addition"; }

bool is_fenced(const Epoch& before) {
  const uint32_t block = before.block;
  return (before.fence_clock && knows(*current, block, before.access.agent, before.fence_clock)) ||
         knows_fenced(*current, block, before.access.agent, before.access.clock);
}

// Whether an access conflicts with an earlier one by another block; if so, it is reported.
bool conflicts(const Epoch& before, const GlobalAccess& access, const void* address, Location where) {
  if (before.block == running->number) return false;
  const bool both_add = before.access.effect == Effect::addition && access.effect == Effect::addition;
  const bool both_strong = before.access.strong && access.strong;
  if (both_strong && !(both_add && launch.schedule.ordered_additions)) return false;
  const auto text = [&](const char* problem) {
    return name_of(access.agent) + " " + verb(access.effect) + " " + name_of_global(address) + problem + noun(before.access.effect) +
           " by " + name_of(before.access.agent) + " of block number " + std::to_string(before.block) + " at " + to_string(before.where);
  };
  if (!knows(*current, before.block, before.access.agent, before.access.clock)) {
    const char* const advice = before.access.async_proxy ? " (cp.async.bulk.wait_group without .read, then a release, would order it)" : "";
    report(both_strong ? "unordered-addition" : "global-race", where, "%s%s", text(", not ordered after the ").c_str(), advice);
    return true;
  }
  if (access.async_proxy && !before.access.async_proxy && launch.schedule.strict_proxy && !is_fenced(before)) {
    report("missing-proxy-fence", where, "%s", text(" through the async proxy; no fence.proxy.async orders it after the ").c_str());
    return true;
  }
  return false;
}

}  // namespace

GlobalAccess plain_access(Effect effect) { return {effect, false, false, current->index, own_clock(*current)}; }
GlobalAccess strong_access(Effect effect, Order order) {
  const uint32_t clock = effect == Effect::read ? own_clock(*current) : strong_clock(*current, order);
  return {effect, true, false, current->index, clock};
}

void check_global_access(const void* address, size_t bytes, const GlobalAccess& access, Location where) {
  if (!launch.schedule.check_races) return;
  Region* region = find_region(address);
  const bool is_read = access.effect == Effect::read;
  if (!region || (is_read && region->writers.empty())) return;
  const size_t size = region->end - region->begin, first = uintptr_t(address) - region->begin;
  if (region->writers.empty()) region->writers.assign(size, 0);
  if (is_read && region->readers.empty()) region->readers.assign(size, 0);
  const bool check_readers = !is_read && !region->readers.empty();
  const EpochIndex own = epoch_of(access, where);
  EpochIndex last_writer = own, last_reader = own;
  for (size_t i = first; i < first + bytes; ++i) {
    const EpochIndex writer = region->writers[i], reader = check_readers ? region->readers[i] : 0;
    if (writer && writer != last_writer && conflicts(epochs[writer], access, address, where)) return;
    if (reader && reader != last_reader && conflicts(epochs[reader], access, address, where)) return;
    last_writer = writer, last_reader = reader;
    if (is_read) {
      region->readers[i] = own;
    } else {
      region->writers[i] = own;
      if (check_readers) region->readers[i] = 0;
    }
  }
}

void fence_global_writes(const Thread& thread) {
  Recent& recent = running->global->of_thread[thread.index];
  for (EpochIndex i : recent.unfenced) epochs[i].fence_clock = own_clock(thread);
  recent.unfenced.clear();
}

void begin_launch_global_races() {
  epochs.assign(1, Epoch{});
  max_epochs = MIN_EPOCHS;
}

void begin_block_global_accesses(Block& block) {
  block.global = std::make_shared<GlobalAccesses>();
  block.global->of_thread.resize(launch.num_threads);
}

}  // namespace emulator
