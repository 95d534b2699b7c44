#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <memory>

#include "number_formats.h"
#include "race_detector.h"
#include "shared_memory.h"
#include "tma.h"

namespace emulator {
namespace {

constexpr int GROUP_THREADS = 128, ROWS = 64, K = 16;

// The accumulator of a whole warpgroup while it is in flight.
struct Flying {
  int slot, n;
  std::vector<float> values;  // ROWS x n
  uint64_t last_product;
  int delivered = 0;  // to how many threads
  bool delivered_to[GROUP_THREADS] = {};
};

struct Product {
  uint64_t number;  // counts the warpgroup's products: the clock of its wgmma agent
  Flying* accumulator;
  WgmmaShape shape;
  uint32_t a_registers[GROUP_THREADS][4];
  uint64_t a_descriptor, b_descriptor;
  bool computed = false;
};

// One thread's operands while it waits for the rest of its warpgroup.
struct Issue {
  WgmmaShape shape;
  Accumulator* accumulator;
  int slot;
  const uint32_t* a_registers;
  uint64_t a_descriptor, b_descriptor;
};

struct Warpgroup {
  int arrived = 0;
  Issue* issues[GROUP_THREADS];
  std::list<Flying> flying;
  std::deque<std::unique_ptr<Product>> products;  // not yet waited for
  uint64_t num_products = 0;
};

struct Progress {  // of one thread
  uint64_t issued = 0, done = 0;
  std::deque<uint64_t> groups;  // `issued` at each commit
  bool needs_fence = true;      // its registers were last touched by ordinary instructions
};

}  // namespace

struct Warpgroups {
  std::vector<Warpgroup> of_index;
  std::vector<Progress> progress_of;  // by thread
};

namespace {

Warpgroup& warpgroup(uint32_t index) { return running->wgmma->of_index[index]; }
Progress& own_progress() { return running->wgmma->progress_of[current->index]; }

// PTX ISA, "Matrix fragments for wgmma": element e of thread t lies in this row and column of D; A is laid out like D with N = 16.
int row_of(int thread, int element) { return thread / 32 * 16 + thread % 32 / 4 + element / 2 % 2 * 8; }
int column_of(int thread, int element) { return element / 4 * 8 + thread % 4 * 2 + element % 2; }

// Shared address of element (mn, k) of an operand: mn is the row of A or the column of B. PTX ISA, "Matrix descriptor".
uint32_t operand_address(uint64_t descriptor, uint32_t mn, uint32_t k, bool mn_major) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  static const uint32_t SWIZZLE_OF_LAYOUT[4] = {0, 128, 64, 32};
  const uint32_t swizzle = SWIZZLE_OF_LAYOUT[descriptor >> 62];
  uint32_t address;
  if (!mn_major) {
    if (swizzle)
      address = start + mn / 8 * stride + mn % 8 * swizzle + k * 2;
    else
      address = start + mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2;
  } else {
    const uint32_t width = swizzle / 2;  // elements of mn per swizzled row
    if (swizzle)
      address = start + mn / width * leading + mn % width * 2 + k % 8 * swizzle + k / 8 * stride;
    else
      address = start + mn / 8 * stride + mn % 8 * 2 + k % 8 * 16 + k / 8 * leading;
  }
  return swizzled(address, swizzle);
}

// Visits an operand of `size` rows (of A) or columns (of B) in chunks of 16 bytes: visit(mn, k, address) of the first element.
template <class F>
void for_each_chunk(uint64_t descriptor, int size, bool mn_major, F&& visit) {
  if (mn_major) {
    for (int k = 0; k < K; ++k)
      for (int mn = 0; mn < size; mn += 8) visit(mn, k, operand_address(descriptor, mn, k, true));
  } else {
    for (int mn = 0; mn < size; ++mn)
      for (int k = 0; k < K; k += 8) visit(mn, k, operand_address(descriptor, mn, k, false));
  }
}

void check_operand(uint64_t descriptor, int size, bool mn_major, const Access& access) {
  bool ok = true;
  for_each_chunk(descriptor, size, mn_major, [&](int, int, uint32_t address) {
    if (!ok) return;
    ok = shared_range_ok(address, 16, "wgmma operand", access.where);
    if (!ok) return;
    const uint32_t offset = address - SHARED_BASE;
    if (in_flight(offset, 16)) {
      report("in-flight-read", access.where, "wgmma reads smem+0x%x while an asynchronous copy into it is still in flight", offset);
      ok = false;
    } else if (launch.schedule.check_races) {
      race_read(offset, 16, access);
    }
  });
}

// Reads an operand into matrix[mn * mn_pitch + k * k_pitch].
void load_operand(uint64_t descriptor, int size, bool mn_major, Float16 type, float sign, float* matrix, int mn_pitch, int k_pitch) {
  for_each_chunk(descriptor, size, mn_major, [&](int mn, int k, uint32_t address) {
    const uint64_t offset = uint64_t(address) - SHARED_BASE;
    const bool inside = address >= SHARED_BASE && offset + 16 <= shared_size();
    const uint16_t* chunk = inside ? reinterpret_cast<const uint16_t*>(shared_memory() + offset) : OUT_OF_RANGE;
    for (int i = 0; i < 8; ++i)
      matrix[(mn + (mn_major ? i : 0)) * mn_pitch + (k + (mn_major ? 0 : i)) * k_pitch] = sign * to_float(chunk[i], type);
  });
}

void compute(Product& product) {
  static float a[ROWS][K], b[K][MAX_WGMMA_N];
  const WgmmaShape& shape = product.shape;
  const int n = shape.n;
  if (shape.a_in_registers) {
    for (int thread = 0; thread < GROUP_THREADS; ++thread)
      for (int element = 0; element < 8; ++element)
        a[row_of(thread, element)][column_of(thread, element)] =
            shape.scale_a * to_float(product.a_registers[thread][element / 2] >> element % 2 * 16, shape.type);
  } else {
    load_operand(product.a_descriptor, ROWS, shape.a_transposed, shape.type, shape.scale_a, &a[0][0], K, 1);
  }
  load_operand(product.b_descriptor, n, shape.b_transposed, shape.type, shape.scale_b, &b[0][0], 1, MAX_WGMMA_N);
  for (int row = 0; row < ROWS; ++row) {
    float* __restrict d = &product.accumulator->values[row * n];
    if (!shape.scale_d) std::fill(d, d + n, 0.0f);
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < n; ++column) d[column] += a[row][k] * b[k][column];
    if (shape.half_accumulator)
      for (int column = 0; column < n; ++column) d[column] = float_of_f16(f16_of_float(d[column]));
  }
  product.computed = true;
}

void check_agreement(const Warpgroup& group, Location where) {
  const Issue& first = *group.issues[0];
  for (int thread = 1; thread < GROUP_THREADS; ++thread) {
    const Issue& other = *group.issues[thread];
    const bool same = other.a_descriptor == first.a_descriptor && other.b_descriptor == first.b_descriptor && other.slot == first.slot &&
                      other.shape.n == first.shape.n && other.shape.scale_d == first.shape.scale_d &&
                      other.shape.b_transposed == first.shape.b_transposed && !other.a_registers == !first.a_registers;
    if (same) continue;
    report("collective", where, "wgmma operands differ between threads 0 and %d of the warpgroup: descriptors A %llx, %llx; B %llx, %llx",
           thread, (unsigned long long)first.a_descriptor, (unsigned long long)other.a_descriptor, (unsigned long long)first.b_descriptor,
           (unsigned long long)other.b_descriptor);
    return;
  }
}

// The accumulator that continues, or a new one with the values of the threads' registers.
Flying& take_accumulator(Warpgroup& group, uint32_t first_thread, Location where) {
  const int slot = group.issues[0]->slot, n = group.issues[0]->shape.n;
  for (Flying& flying : group.flying) {
    if (flying.slot != slot || flying.delivered) continue;
    for (int thread = 0; thread < GROUP_THREADS; ++thread)
      if (group.issues[thread]->accumulator->touched) {
        report("acc-touched", where, "accumulator registers of thread %u were modified while a wgmma on them is in flight",
               first_thread + thread);
        break;
      }
    return flying;
  }
  group.flying.push_back({slot, n, std::vector<float>(size_t(ROWS) * n), 0});
  Flying& flying = group.flying.back();
  for (int thread = 0; thread < GROUP_THREADS; ++thread)
    for (int element = 0; element < n / 2; ++element)
      flying.values[row_of(thread, element) * n + column_of(thread, element)] = group.issues[thread]->accumulator->values[element];
  return flying;
}

}  // namespace

void wgmma_fence(Location where) {
  current->location = where;
  own_progress().needs_fence = false;
}

void wgmma(const WgmmaShape& shape, Accumulator& accumulator, int slot, const uint32_t* a_registers, uint64_t a_descriptor,
           uint64_t b_descriptor, Location where) {
  Thread& self = *current;
  self.location = where;
  const uint32_t group_index = self.index / GROUP_THREADS, first_thread = group_index * GROUP_THREADS;
  Progress& progress = own_progress();
  if (progress.needs_fence) {
    report("missing-wgmma-fence", where, "wgmma without a wgmma.fence since ordinary instructions last used its registers");
    progress.needs_fence = false;
  }
  if (first_thread + GROUP_THREADS > launch.num_threads) {
    report("collective", where, "wgmma in a warpgroup of fewer than 128 threads");
    return;
  }
  Warpgroup& group = warpgroup(group_index);
  Issue issue{shape, &accumulator, slot, a_registers, a_descriptor, b_descriptor};
  group.issues[self.index % GROUP_THREADS] = &issue;
  ++progress.issued;
  if (++group.arrived < GROUP_THREADS) {
    block_current("wgmma", where, group_index);
    return;
  }
  group.arrived = 0;
  ++counts.wgmma;
  check_agreement(group, where);

  auto product = std::make_unique<Product>();
  product->number = ++group.num_products;
  product->accumulator = &take_accumulator(group, first_thread, where);
  product->accumulator->last_product = product->number;
  product->shape = shape;
  product->a_descriptor = a_descriptor;
  product->b_descriptor = b_descriptor;
  if (shape.a_in_registers)
    for (int thread = 0; thread < GROUP_THREADS; ++thread) memcpy(product->a_registers[thread], group.issues[thread]->a_registers, 16);

  Access access{wgmma_agent(group_index), uint32_t(product->number), nullptr, nullptr, true, where};
  if (launch.schedule.check_races) access = access_for_warpgroup(first_thread, access.agent, access.clock, where);
  if (!shape.a_in_registers) check_operand(a_descriptor, ROWS, shape.a_transposed, access);
  check_operand(b_descriptor, shape.n, shape.b_transposed, access);
  if (launch.schedule.delivery == Delivery::eager) compute(*product);
  group.products.push_back(std::move(product));
  for (uint32_t thread = first_thread; thread < first_thread + GROUP_THREADS; ++thread)
    if (thread != self.index) set_runnable(running->threads[thread]);
}

void wgmma_commit(Location where) {
  maybe_preempt();
  current->location = where;
  Progress& progress = own_progress();
  progress.groups.push_back(progress.issued);
}

void wgmma_wait(uint32_t groups_left, std::deque<Accumulator>& accumulators, Location where) {
  maybe_preempt();
  current->location = where;
  Progress& progress = own_progress();
  while (progress.groups.size() > groups_left) {
    progress.done = progress.groups.front();
    progress.groups.pop_front();
  }
  const uint32_t group_index = current->index / GROUP_THREADS;
  const int rank = int(current->index % GROUP_THREADS);
  set_seen(*current, wgmma_agent(group_index), uint32_t(progress.done));
  Warpgroup& group = warpgroup(group_index);
  while (!group.products.empty() && group.products.front()->number <= progress.done) {
    if (!group.products.front()->computed) compute(*group.products.front());
    group.products.pop_front();
  }
  for (auto flying = group.flying.begin(); flying != group.flying.end();) {
    if (flying->last_product > progress.done || flying->delivered_to[rank]) {
      ++flying;
      continue;
    }
    Accumulator& accumulator = accumulators[flying->slot];
    for (int element = 0; element < flying->n / 2; ++element)
      accumulator.values[element] = flying->values[row_of(rank, element) * flying->n + column_of(rank, element)];
    accumulator.active = false;
    flying->delivered_to[rank] = progress.needs_fence = true;
    flying = ++flying->delivered == GROUP_THREADS ? group.flying.erase(flying) : std::next(flying);
  }
}

void begin_block_wgmma(Block& block) {
  block.wgmma = std::make_shared<Warpgroups>();
  block.wgmma->of_index = std::vector<Warpgroup>((launch.num_threads + GROUP_THREADS - 1) / GROUP_THREADS);
  block.wgmma->progress_of.resize(launch.num_threads);
}

void check_wgmma_at_exit() {
  const Progress& progress = own_progress();
  if (progress.done < progress.issued) report("exit-pending", current->location, "the thread exits with wgmma in flight");
}

}  // namespace emulator
