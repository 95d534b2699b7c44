#include "race_detector.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "global_races.h"
#include "shared_memory.h"

namespace emulator {
namespace {

constexpr uint32_t MAX_TMA_LOAD_AGENTS = 64, MAX_TMA_STORE_AGENTS = 32;
constexpr uint32_t GRANULE = 2;  // bytes of shared memory that share one history

struct Reader {
  uint32_t clock;
  Location where;
  uint16_t agent;
  uint8_t bytes;  // bit set: which bytes of the granule
};

// The last write and, since then, the last read of each agent. Most granules have one reader, kept in place.
struct History {
  uint32_t write_clock;  // 0: never written
  uint32_t more_readers;
  Location write_where;
  uint16_t writer;
  uint8_t write_bytes, write_async;
  Reader reader;  // clock 0: none
};

struct ReaderNode {
  Reader reader;
  uint32_t next;
};

// The same in every block of a launch.
uint32_t num_agents, first_cp_async, first_wgmma, first_tma_load, first_tma_store, first_global_write;

}  // namespace

struct Races {
  std::vector<History> histories;
  std::vector<ReaderNode> reader_nodes;            // index 0 is the end of every list
  std::vector<uint32_t> clock_memory;              // of every thread: seen, then fenced
  std::vector<OtherBlocks> others, others_fenced;  // by thread
  uint32_t num_tma_loads, num_tma_stores;
};

namespace {

uint32_t* seen_by(uint32_t thread) { return &running->races->clock_memory[size_t(thread) * 2 * num_agents]; }
uint32_t* fenced_by(uint32_t thread) { return seen_by(thread) + num_agents; }

void join(uint32_t* into, const uint32_t* from) {
  for (uint32_t i = 0; i < num_agents; ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

std::string name_of(Agent agent) {
  auto number = [](uint32_t n) { return std::to_string(n); };
  if (agent < first_cp_async) return "thread " + number(agent) + " (warp " + number(agent / 32) + " lane " + number(agent % 32) + ")";
  if (agent < first_wgmma) return "cp.async of thread " + number(agent - first_cp_async);
  if (agent < first_tma_load) return "wgmma of warpgroup " + number(agent - first_wgmma);
  if (agent < first_tma_store) return "TMA load (mbarrier #" + number(agent - first_tma_load) + ")";
  return "TMA store #" + number(agent - (agent < first_global_write ? first_tma_store : first_global_write));
}

namespace {

// The bytes of granule g that lie in [offset, offset + bytes), as a bit set.
uint8_t bytes_of_granule(uint32_t g, uint32_t offset, uint32_t bytes) {
  uint8_t mask = 0;
  for (uint32_t i = 0; i < GRANULE; ++i)
    if (g * GRANULE + i >= offset && g * GRANULE + i < offset + bytes) mask |= 1 << i;
  return mask;
}

void report_read_race(const Access& access, uint32_t g, const Reader& reader) {
  report("race", access.where, "%s overwrites smem+0x%x while %s may still be reading it (read at %s)", name_of(access.agent).c_str(),
         g * GRANULE, name_of(reader.agent).c_str(), to_string(reader.where).c_str());
}

void add_reader(std::vector<ReaderNode>& reader_nodes, History& history, const Access& access, uint8_t mask) {
  Reader& first = history.reader;
  const bool replaces = first.agent == access.agent || !first.clock || access.seen[first.agent] >= first.clock;
  if (!history.more_readers && replaces) {
    first = {access.clock, access.where, uint16_t(access.agent), mask};
    return;
  }
  if (first.agent == access.agent) {
    first.clock = access.clock;
    first.bytes |= mask;
    return;
  }
  for (uint32_t i = history.more_readers; i; i = reader_nodes[i].next)
    if (reader_nodes[i].reader.agent == access.agent) {
      reader_nodes[i].reader.clock = access.clock;
      reader_nodes[i].reader.bytes |= mask;
      return;
    }
  reader_nodes.push_back({{access.clock, access.where, uint16_t(access.agent), mask}, history.more_readers});
  history.more_readers = uint32_t(reader_nodes.size() - 1);
}

}  // namespace

Agent cp_async_agent(uint32_t thread) { return first_cp_async + thread; }
Agent wgmma_agent(uint32_t warpgroup) { return first_wgmma + warpgroup; }

Agent new_tma_load_agent(Location where) {
  uint32_t& num_tma_loads = running->races->num_tma_loads;
  if (num_tma_loads == MAX_TMA_LOAD_AGENTS) report("limit", where, "more than %u mbarriers", MAX_TMA_LOAD_AGENTS);
  return first_tma_load + std::min(num_tma_loads++, MAX_TMA_LOAD_AGENTS - 1);
}

Agent new_tma_store_agent() { return first_tma_store + std::min(running->races->num_tma_stores++, MAX_TMA_STORE_AGENTS - 1); }
Agent global_write_agent(Agent tma_store_agent) { return tma_store_agent + MAX_TMA_STORE_AGENTS; }

void clear(Knowledge& knowledge) {
  if (!launch.schedule.check_races) return;
  knowledge.seen.assign(num_agents, 0);
  knowledge.fenced.assign(num_agents, 0);
  knowledge.others = knowledge.others_fenced = nullptr;
}

void release(const Thread& thread, Knowledge& knowledge) {
  if (!launch.schedule.check_races) return;
  join(knowledge.seen.data(), seen_by(thread.index));
  join(knowledge.fenced.data(), fenced_by(thread.index));
  const Races& races = *running->races;
  join(knowledge.others, races.others[thread.index]);
  join(knowledge.others_fenced, races.others_fenced[thread.index]);
  ++seen_by(thread.index)[thread.index];
}

void acquire(const Thread& thread, const Knowledge& knowledge) {
  if (!launch.schedule.check_races) return;
  join(seen_by(thread.index), knowledge.seen.data());
  join(fenced_by(thread.index), knowledge.fenced.data());
  Races& races = *running->races;
  join(races.others[thread.index], knowledge.others);
  join(races.others_fenced[thread.index], knowledge.others_fenced);
}

void set_seen(Knowledge& knowledge, Agent agent, uint32_t clock) {
  if (launch.schedule.check_races) knowledge.seen[agent] = clock;
}

void set_seen(const Thread& thread, Agent agent, uint32_t clock) {
  if (launch.schedule.check_races) seen_by(thread.index)[agent] = std::max(seen_by(thread.index)[agent], clock);
}

uint32_t seen(const Thread& thread, Agent agent) { return launch.schedule.check_races ? seen_by(thread.index)[agent] : ~0u; }
uint32_t own_clock(const Thread& thread) { return launch.schedule.check_races ? seen_by(thread.index)[thread.index] : 0; }

void fence_async_proxy(const Thread& thread, bool shared_memory, bool global_memory) {
  if (!launch.schedule.check_races) return;
  uint32_t *seen = seen_by(thread.index), *fenced = fenced_by(thread.index);
  if (shared_memory && launch.schedule.strict_proxy) {  // only what this thread and its own copies wrote
    fenced[thread.index] = seen[thread.index];
    fenced[cp_async_agent(thread.index)] = seen[cp_async_agent(thread.index)];
  } else if (shared_memory) {
    memcpy(fenced, seen, num_agents * sizeof *seen);
  }
  if (global_memory) {
    fence_global_writes(thread);
    running->races->others_fenced[thread.index] = running->races->others[thread.index];
  }
  ++seen[thread.index];
}

OtherBlocks publish(const Thread& thread) {
  uint32_t* seen = seen_by(thread.index);
  const BlockClocks own{running->number, std::make_shared<Clocks>(seen, seen + 2 * num_agents)};
  ++seen[thread.index];
  return joined(running->races->others[thread.index], std::make_shared<std::vector<BlockClocks>>(1, own));
}

void receive(const Thread& thread, const OtherBlocks& published) {
  for (const BlockClocks& known : *published)
    if (known.block == running->number) {
      join(seen_by(thread.index), known.clocks->data());
      join(fenced_by(thread.index), known.clocks->data() + num_agents);
    }
  join(running->races->others[thread.index], published);
}

bool knows(const Thread& thread, uint32_t block, Agent agent, uint32_t clock) {
  return includes(running->races->others[thread.index], block, agent, clock);
}

bool knows_fenced(const Thread& thread, uint32_t block, Agent agent, uint32_t clock) {
  return includes(running->races->others_fenced[thread.index], block, agent, clock);
}

Access access_by(const Thread& thread, Location where) {
  const uint32_t* seen = seen_by(thread.index);
  return {thread.index, seen[thread.index], seen, fenced_by(thread.index), false, where};
}

Access access_for(const Thread& thread, Agent agent, uint32_t clock, bool async_proxy, Location where) {
  return {agent, clock, seen_by(thread.index), fenced_by(thread.index), async_proxy, where};
}

Access access_for_warpgroup(uint32_t first_thread, Agent agent, uint32_t clock, Location where) {
  static std::vector<uint32_t> seen, fenced;
  for (uint32_t warp = 0; warp < 4; ++warp) {
    const uint32_t thread = first_thread + warp * 32 + random_number() % 32;
    const uint32_t *thread_seen = seen_by(thread), *thread_fenced = fenced_by(thread);
    if (warp == 0) {
      seen.assign(thread_seen, thread_seen + num_agents);
      fenced.assign(thread_fenced, thread_fenced + num_agents);
    }
    for (uint32_t i = 0; i < num_agents; ++i) {
      seen[i] = std::min(seen[i], thread_seen[i]);
      fenced[i] = std::min(fenced[i], thread_fenced[i]);
    }
  }
  return {agent, clock, seen.data(), fenced.data(), true, where};
}

void race_read(uint32_t offset, uint32_t bytes, const Access& access) {
  Races& races = *running->races;
  for (uint32_t g = offset / GRANULE; g <= (offset + bytes - 1) / GRANULE; ++g) {
    History& history = races.histories[g];
    const uint8_t mask = bytes_of_granule(g, offset, bytes);
    if (history.write_clock && history.writer != access.agent && (history.write_bytes & mask)) {
      if (access.seen[history.writer] < history.write_clock) {
        report("race", access.where, "%s reads smem+0x%x, not ordered after the write by %s at %s", name_of(access.agent).c_str(),
               g * GRANULE, name_of(history.writer).c_str(), to_string(history.write_where).c_str());
        history.write_clock = 0;
      } else if (access.async_proxy && !history.write_async && access.fenced[history.writer] < history.write_clock) {
        report("missing-proxy-fence", access.where,
               "%s reads smem+0x%x through the async proxy; the write by %s at %s has no fence.proxy.async before the synchronisation",
               name_of(access.agent).c_str(), g * GRANULE, name_of(history.writer).c_str(), to_string(history.write_where).c_str());
        history.write_clock = 0;
      }
    } else if (!history.write_bytes && launch.schedule.report_uninitialized) {
      report("uninitialized", access.where, "%s reads smem+0x%x, which nothing has written", name_of(access.agent).c_str(), g * GRANULE);
    }
    add_reader(races.reader_nodes, history, access, mask);
  }
}

void race_write(uint32_t offset, uint32_t bytes, const Access& access, const void* data) {
  Races& races = *running->races;
  for (uint32_t g = offset / GRANULE; g <= (offset + bytes - 1) / GRANULE; ++g) {
    History& history = races.histories[g];
    const uint8_t mask = bytes_of_granule(g, offset, bytes);
    const bool whole = mask == (1 << GRANULE) - 1;
    // Several lanes of a warp that store the same value to one place: a common idiom after replicated reductions, no race.
    const bool same_value = data && whole && history.writer / 32 == access.agent / 32 &&
                            !memcmp(shared_memory() + g * GRANULE, static_cast<const char*>(data) + (g * GRANULE - offset), GRANULE);
    if (history.write_clock && history.writer != access.agent && (history.write_bytes & mask)) {
      if (access.seen[history.writer] < history.write_clock && !same_value)
        report("race", access.where, "%s writes smem+0x%x, not ordered after the write by %s at %s", name_of(access.agent).c_str(),
               g * GRANULE, name_of(history.writer).c_str(), to_string(history.write_where).c_str());
      else if (access.async_proxy && !history.write_async && access.fenced[history.writer] < history.write_clock)
        report("missing-proxy-fence", access.where, "%s overwrites smem+0x%x through the async proxy; the write by %s at %s was not fenced",
               name_of(access.agent).c_str(), g * GRANULE, name_of(history.writer).c_str(), to_string(history.write_where).c_str());
    }
    const Reader& first = history.reader;
    if (first.clock && first.agent != access.agent && (first.bytes & mask) && access.seen[first.agent] < first.clock)
      report_read_race(access, g, first);
    for (uint32_t i = history.more_readers; i; i = races.reader_nodes[i].next) {
      const Reader& reader = races.reader_nodes[i].reader;
      if (reader.agent == access.agent || !(reader.bytes & mask) || access.seen[reader.agent] >= reader.clock) continue;
      report_read_race(access, g, reader);
      break;
    }
    history = {access.clock, 0, access.where, uint16_t(access.agent), mask, access.async_proxy, Reader{}};
  }
}

void begin_launch_races() {
  const uint32_t num_threads = launch.num_threads;
  first_cp_async = num_threads;
  first_wgmma = 2 * num_threads;
  first_tma_load = first_wgmma + (num_threads + 127) / 128;
  first_tma_store = first_tma_load + MAX_TMA_LOAD_AGENTS;
  first_global_write = first_tma_store + MAX_TMA_STORE_AGENTS;
  num_agents = (first_global_write + MAX_TMA_STORE_AGENTS + 15) / 16 * 16;
}

void begin_block_races(Block& block) {
  if (!block.races) block.races = std::make_shared<Races>();
  Races& races = *block.races;
  races.num_tma_loads = races.num_tma_stores = 0;
  if (!launch.schedule.check_races) {
    races.clock_memory.assign(1, 0);
    return;
  }
  races.histories.assign(shared_size() / GRANULE + 1, History{});
  races.reader_nodes.assign(1, ReaderNode{});
  races.clock_memory.assign(size_t(launch.num_threads) * 2 * num_agents, 0);
  races.others.assign(launch.num_threads, nullptr);
  races.others_fenced.assign(launch.num_threads, nullptr);
  for (uint32_t i = 0; i < launch.num_threads; ++i) races.clock_memory[size_t(i) * 2 * num_agents + i] = 1;
}

}  // namespace emulator
