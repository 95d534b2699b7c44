#include "tma.h"

#include <algorithm>
#include <cstring>
#include <deque>

#include "global_memory.h"
#include "global_races.h"
#include "number_formats.h"
#include "shared_memory.h"

namespace emulator {
namespace {

constexpr uint32_t MAGIC = 0x544d4150;

// One box. A run of bytes is a box of rank 1 with elements of one byte.
struct Box {
  TensorMap map;  // by value: the kernel parameter may be gone when the copy happens
  uint32_t address, bytes;
  int coordinates[5];
};

struct Load {
  Box box;
  uint32_t mbarrier, phase;
  Location where;
};

struct Store {
  Box box;
  StoreKind kind;
  bool is_read = false, is_written = false;  // its source in shared memory; its destination
  std::vector<uint8_t> data;                 // between the two
};

using Group = std::vector<Store>;
struct Stores {  // of one thread
  Group open;
  std::deque<Group> committed;               // those whose writes it has not waited for
  uint32_t num_committed = 0, num_read = 0;  // num_read: groups whose reads of shared memory it has waited for
  int64_t agent = -1;
};

Group late_stores;  // of threads that have exited and did not wait for their writes

}  // namespace

struct TmaCopies {
  std::vector<Load> loads;  // in flight
  std::vector<Stores> stores_of;
};

namespace {

std::vector<Load>& loads() { return running->tma->loads; }
Stores& own_stores() { return running->tma->stores_of[current->index]; }

Box box_of(const TensorMap& map, uint32_t address, const int* coordinates) {
  Box box{map, address, map.element_bytes, {}};
  for (int i = 0; i < map.rank; ++i) {
    box.bytes *= map.box[i];
    box.coordinates[i] = coordinates[i];
  }
  return box;
}

Box box_of_bytes(const void* base, uint32_t address, uint32_t bytes) {
  TensorMap map{};
  map.base = uint64_t(base);
  map.rank = map.element_bytes = 1;
  map.dim[0] = map.box[0] = bytes;
  map.stride[0] = 1;
  map.magic = MAGIC;
  const int origin[5] = {};
  return box_of(map, address, origin);
}

// Visits the box in pieces of at most 16 bytes, the unit of swizzling: visit(shared offset, global pointer, first and last valid
// byte of the piece). Elements outside the tensor are not valid.
template <class F>
void for_each_piece(const Box& box, F&& visit) {
  const TensorMap& map = box.map;
  uint32_t index[5] = {};
  const uint32_t row_bytes = map.box[0] * map.element_bytes, rows = box.bytes / row_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t offset = int64_t(box.coordinates[0]) * map.element_bytes;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t position = int64_t(box.coordinates[i]) + index[i];
      inside &= position >= 0 && position < int64_t(map.dim[i]);
      offset += position * int64_t(map.stride[i]);
    }
    const int64_t first = std::max<int64_t>(0, -int64_t(box.coordinates[0])) * map.element_bytes;
    const int64_t last = std::min<int64_t>(map.box[0], int64_t(map.dim[0]) - box.coordinates[0]) * map.element_bytes;
    for (uint32_t x = 0; x < row_bytes; x += 16) {
      const int64_t piece = std::min<uint32_t>(16, row_bytes - x);
      const int64_t low = inside ? std::clamp<int64_t>(first - x, 0, piece) : 0,
                    high = inside ? std::clamp<int64_t>(last - x, 0, piece) : 0;
      visit(swizzled(box.address + row * row_bytes + x, map.swizzle) - SHARED_BASE, reinterpret_cast<uint8_t*>(map.base + offset + x), low,
            std::max(low, high), piece);
    }
    for (int i = 1; i < map.rank; ++i) {
      if (++index[i] < map.box[i]) break;
      index[i] = 0;
    }
  }
}

bool box_ok(const TensorMap* map, int rank, uint32_t address, uint32_t bytes, const char* what, Location where) {
  if (map->magic != MAGIC || map->rank != rank) {
    report("tma", where, "%s: the operand is not a tensor map of rank %d", what, rank);
    return false;
  }
  const uint32_t alignment = map->swizzle ? 8 * map->swizzle : 128;
  if (address % alignment)
    report("misaligned", where, "%s: shared address 0x%x is not a multiple of %u bytes, as %u-byte swizzle needs", what, address, alignment,
           map->swizzle);
  return shared_range_ok(address, bytes, what, where);
}

// The parts of a box that lie inside the tensor are read or written by another proxy than plain accesses.
void check_global_side(const Box& box, const GlobalAccess& access, Location where) {
  for_each_piece(box, [&](uint32_t, const uint8_t* global, int64_t low, int64_t high, int64_t) {
    if (high > low) check_global_access(global + low, high - low, access, where);
  });
}

void issue_load(const Box& box, uint32_t address, Location where) {
  ++counts.tma;
  MBarrier* barrier = find_mbarrier(address, "TMA load", where);
  if (!barrier) return;
  if (!barrier->fenced) {
    report("missing-proxy-fence", where,
           "TMA uses the mbarrier initialised at %s without fence.mbarrier_init or fence.proxy.async after the initialisation",
           to_string(barrier->init_where).c_str());
    barrier->fenced = true;
  }
  const uint32_t offset = box.address - SHARED_BASE;
  if (in_flight(offset, box.bytes))
    report("in-flight-write", where, "TMA load into smem+0x%x, which another asynchronous copy is still filling", offset);
  if (launch.schedule.check_races) {
    race_write(offset, box.bytes, access_for(*current, barrier->load_agent, barrier->phase + 1, true, where));
    const Region* source = find_region(reinterpret_cast<void*>(box.map.base));
    if (source && !source->writers.empty()) check_global_side(box, {Effect::read, false, true, current->index, own_clock(*current)}, where);
  }
  begin_flight(offset, box.bytes);
  loads().push_back({box, address, barrier->phase, where});
  while (launch.schedule.delivery == Delivery::eager && deliver_tma_load()) continue;
}

void issue_store(const Box& box, StoreKind kind, Location where) {
  ++counts.tma;
  const uint32_t offset = box.address - SHARED_BASE;
  if (in_flight(offset, box.bytes))
    report("in-flight-read", where, "TMA store reads smem+0x%x while an asynchronous copy into it is still in flight", offset);
  bool in_range = true;
  for_each_piece(box, [&](uint32_t, const uint8_t* global, int64_t low, int64_t high, int64_t) {
    in_range = in_range && (high == low || global_range_ok(global + low, high - low, "TMA store", where));
  });
  Stores& stores = own_stores();
  if (stores.agent < 0) stores.agent = new_tma_store_agent();
  if (launch.schedule.check_races) {
    const Agent agent = Agent(stores.agent);
    const uint32_t clock = stores.num_committed + 1;
    race_read(offset, box.bytes, access_for(*current, agent, clock, true, where));
    const Effect effect = kind == StoreKind::copy || kind == StoreKind::add_32 ? Effect::write : Effect::addition;
    if (in_range) check_global_side(box, {effect, kind != StoreKind::copy, true, global_write_agent(agent), clock}, where);
  }
  if (in_range) stores.open.push_back({box, kind, false, false, {}});
}

uint32_t sum(uint32_t x, uint32_t y, StoreKind kind) {
  switch (kind) {
    case StoreKind::add_f32:
      return bits_of_float(float_of_bits(x) + float_of_bits(y));
    case StoreKind::add_f16:
      return f16_of_float(to_float(x, Float16::f16) + to_float(y, Float16::f16));
    case StoreKind::add_bf16:
      return bf16_of_float(to_float(x, Float16::bf16) + to_float(y, Float16::bf16));
    default:
      return x + y;
  }
}

void add(uint8_t* to, const uint8_t* from, int64_t bytes, StoreKind kind) {
  const int64_t size = kind == StoreKind::add_f16 || kind == StoreKind::add_bf16 ? 2 : 4;
  for (int64_t i = 0; i < bytes; i += size) {
    uint32_t x = 0, y = 0;
    memcpy(&x, to + i, size);
    memcpy(&y, from + i, size);
    x = sum(x, y, kind);
    memcpy(to + i, &x, size);
  }
}

void read_source(Store& store) {
  if (store.is_read) return;
  store.is_read = true;
  store.data.reserve(store.box.bytes);
  for_each_piece(store.box, [&](uint32_t offset, uint8_t*, int64_t, int64_t, int64_t piece) {
    store.data.insert(store.data.end(), shared_memory() + offset, shared_memory() + offset + piece);
  });
}

void write_destination(Store& store) {
  if (store.is_written) return;
  read_source(store);
  store.is_written = true;
  ++progress;
  const uint8_t* from = store.data.data();
  for_each_piece(store.box, [&](uint32_t, uint8_t* global, int64_t low, int64_t high, int64_t piece) {
    if (high > low && store.kind == StoreKind::copy)
      memcpy(global + low, from + low, high - low);
    else if (high > low)
      add(global + low, from + low, high - low, store.kind);
    from += piece;
  });
  store.data = {};
}

}  // namespace

const char* encode_tensor_map(TensorMap* map, uint32_t element_bytes, uint32_t rank, uint64_t base, const uint64_t* dim,
                              const uint64_t* stride, const uint32_t* box, uint32_t swizzle) {
  *map = TensorMap{};
  if (rank < 1 || rank > 5) return "the rank must be 1 to 5";
  if (base % 16) return "the base address must be a multiple of 16 bytes";
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128) return "the swizzle must be 0, 32, 64 or 128 bytes";
  map->base = base;
  map->rank = uint8_t(rank);
  map->element_bytes = uint8_t(element_bytes);
  map->swizzle = uint8_t(swizzle);
  map->magic = MAGIC;
  for (uint32_t i = 0; i < rank; ++i) {
    map->dim[i] = dim[i];
    map->box[i] = box[i];
    map->stride[i] = i ? stride[i - 1] : element_bytes;
    if (dim[i] == 0 || dim[i] > 1ull << 32) return "every dimension must be 1 to 2^32";
    if (box[i] == 0 || box[i] > 256) return "every side of the box must be 1 to 256";
    if (i && (map->stride[i] % 16 || map->stride[i] >= 1ull << 40)) return "every stride must be a multiple of 16 bytes below 2^40";
  }
  if (box[0] * element_bytes % 16) return "the innermost side of the box must be a multiple of 16 bytes";
  if (swizzle && box[0] * element_bytes > swizzle) return "the innermost side of the box must fit the swizzle";
  return nullptr;
}

uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  const uint32_t chunks = swizzle ? (swizzle / 16 - 1) << 4 : 0;
  return address ^ (address >> 3 & chunks);
}

void tma_load(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int rank, const int* coordinates, Location where) {
  current->location = where;
  const Box box = box_of(*map, destination, coordinates);
  if (box_ok(map, rank, destination, box.bytes, "TMA load", where)) issue_load(box, mbarrier, where);
}

void tma_load_bytes(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Location where) {
  current->location = where;
  if (destination % 16 || uintptr_t(source) % 16 || bytes % 16) {
    report("misaligned", where, "bulk load of %u bytes from %p to shared 0x%x: all must be multiples of 16", bytes, source, destination);
    return;
  }
  if (bytes && shared_range_ok(destination, bytes, "bulk load", where))
    issue_load(box_of_bytes(source, destination, bytes), mbarrier, where);
}

void tma_store(const TensorMap* map, uint32_t source, int rank, const int* coordinates, StoreKind kind, Location where) {
  current->location = where;
  const Box box = box_of(*map, source, coordinates);
  if (box_ok(map, rank, source, box.bytes, "TMA store", where)) issue_store(box, kind, where);
}

void tma_store_bytes(void* destination, uint32_t source, uint32_t bytes, StoreKind kind, Location where) {
  current->location = where;
  if (source % 16 || uintptr_t(destination) % 16 || bytes % 16) {
    report("misaligned", where, "bulk store of %u bytes from shared 0x%x to %p: all must be multiples of 16", bytes, source, destination);
    return;
  }
  if (bytes && shared_range_ok(source, bytes, "bulk store", where)) issue_store(box_of_bytes(destination, source, bytes), kind, where);
}

void tma_store_commit(Location where) {
  maybe_preempt();
  current->location = where;
  Stores& stores = own_stores();
  const bool at_once = launch.schedule.delivery == Delivery::eager || (launch.schedule.delivery == Delivery::random && random_number() % 2);
  for (Store& store : stores.open)
    if (at_once) write_destination(store);
  stores.committed.push_back(std::move(stores.open));
  stores.open.clear();
  ++stores.num_committed;
}

void tma_store_wait(uint32_t groups_left, bool read, Location where) {
  maybe_preempt();
  current->location = where;
  Stores& stores = own_stores();
  for (size_t i = 0; i + groups_left < stores.committed.size(); ++i)
    for (Store& store : stores.committed[i]) read ? read_source(store) : write_destination(store);
  while (!read && stores.committed.size() > groups_left) stores.committed.pop_front();
  const uint32_t clock = stores.num_committed - std::min(groups_left, stores.num_committed);
  stores.num_read = std::max(stores.num_read, clock);
  if (stores.agent < 0) return;
  set_seen(*current, Agent(stores.agent), clock);
  if (!read) set_seen(*current, global_write_agent(Agent(stores.agent)), clock);
}

bool deliver_tma_load() {
  std::vector<Load>& flying = loads();
  if (flying.empty()) return false;
  const size_t i = launch.schedule.delivery == Delivery::eager ? 0 : random_number() % flying.size();
  const Load load = flying[i];
  flying.erase(flying.begin() + i);
  for_each_piece(load.box, [&](uint32_t offset, const uint8_t* global, int64_t low, int64_t high, int64_t piece) {
    memset(shared_memory() + offset, 0, piece);
    if (high > low && global_range_ok(global + low, high - low, "TMA load", load.where))
      memcpy(shared_memory() + offset + low, global + low, high - low);
  });
  end_flight(load.box.address - SHARED_BASE, load.box.bytes);
  mbarrier_receive_bytes(load.mbarrier, load.box.bytes);
  return true;
}

void check_no_load_pending(const MBarrier& barrier) {
  for (const Load& load : loads())
    if (load.mbarrier == barrier.address && load.phase == barrier.phase) {
      report("tx-count", load.where,
             "mbarrier smem+0x%x (initialised at %s) completes phase %u while a TMA load of %u bytes on it is in flight: expect_tx is too "
             "small",
             barrier.address - SHARED_BASE, to_string(barrier.init_where).c_str(), barrier.phase, load.box.bytes);
      return;
    }
}

void land_late_stores() {
  for (Store& store : late_stores) write_destination(store);
  late_stores.clear();
}

void begin_launch_tma() { late_stores.clear(); }

void begin_block_tma(Block& block) {
  block.tma = std::make_shared<TmaCopies>();
  block.tma->stores_of.resize(launch.num_threads);
}

void check_tma_stores_at_exit() {
  Stores& stores = own_stores();
  bool pending = !stores.open.empty();
  uint32_t clock = stores.num_committed - uint32_t(stores.committed.size());
  for (Group& group : stores.committed) {
    pending |= ++clock > stores.num_read && !group.empty();
    for (Store& store : group)
      if (store.is_read && !store.is_written) late_stores.push_back(std::move(store));
  }
  if (pending)
    report("exit-pending", current->location,
           "the thread exits while its TMA stores still read shared memory (no cp.async.bulk.wait_group)");
}

void check_tma_loads_at_end() {
  if (!loads().empty())
    report("exit-pending", loads()[0].where, "the block ends with %zu TMA loads in flight (issued here) that nobody waited for",
           loads().size());
}

}  // namespace emulator
