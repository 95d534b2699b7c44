#include "warp_operations.h"

#include <cstring>

#include "number_formats.h"
#include "race_detector.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// Lanes of one warp that wait for each other at one operation. Disjoint masks may be under way at the same time.
struct Meeting {
  uint32_t mask, arrived;
  const char* operation;
  int variant;  // must agree between the lanes
  Location where;
  void* arguments[32];
};

struct WarpMeetings {
  Meeting slots[32];
};

}  // namespace

struct WarpOperations {
  std::vector<WarpMeetings> meetings;  // by warp
  std::vector<int> registers;          // by warp, per thread
  int64_t register_pool;
};

namespace {

constexpr const char* POOL_EMPTY = "setmaxnreg.inc (register pool empty)";

constexpr uint32_t ALL_LANES = ~0u;

template <class F>
void for_each_lane(uint32_t mask, F&& visit) {
  for (; mask; mask &= mask - 1) visit(uint32_t(__builtin_ctz(mask)));
}

// Waits until every lane of the mask is here with its argument; the last one runs combine(arguments).
// `aligned`: the whole warp must execute the very same instruction.
template <class F>
void meet(const char* operation, int variant, uint32_t mask, bool aligned, void* argument, Location where, F&& combine) {
  Thread& self = *current;
  self.location = where;
  const uint32_t own_bit = 1u << self.lane;
  if (!(mask & own_bit)) {
    report("collective", where, "%s: the calling lane %u is not in the mask 0x%x", operation, self.lane, mask);
    mask |= own_bit;
  }
  Meeting *joined = nullptr, *free = nullptr;
  for (Meeting& meeting : running->warp_operations->meetings[self.warp].slots) {
    if (!meeting.arrived) {
      if (!free) free = &meeting;
    } else if (meeting.mask & mask) {
      joined = &meeting;
      break;
    }
  }
  if (joined && (joined->mask != mask || strcmp(joined->operation, operation) || joined->variant != variant ||
                 (aligned && !same_line(joined->where, where)))) {
    report("divergent-collective", where, "%s (mask 0x%x) reached while other lanes of the warp wait in %s (mask 0x%x) at %s", operation,
           mask, joined->operation, joined->mask, to_string(joined->where).c_str());
    block_current(operation, where);
    return;
  }
  Meeting& meeting = joined ? *joined : *free;
  if (!joined) {
    meeting.mask = mask;
    meeting.operation = operation;
    meeting.variant = variant;
    meeting.where = where;
  }
  meeting.arguments[self.lane] = argument;
  meeting.arrived |= own_bit;
  if (meeting.arrived != mask) {
    block_current(operation, where, 0, mask);
    return;
  }
  combine(meeting.arguments);
  meeting.arrived = 0;
  for_each_lane(mask & ~own_bit, [&](uint32_t lane) { set_runnable(running->threads[self.warp * 32 + lane]); });
}

Thread& thread_of_lane(uint32_t lane) { return running->threads[current->warp * 32 + lane]; }

struct Exchange {
  uint32_t value, source_lane, result;
};
Exchange& exchange_of(void** arguments, uint32_t lane) { return *static_cast<Exchange*>(arguments[lane]); }

struct MatrixRows {
  uint32_t* registers;
  uint32_t address;
};
MatrixRows& rows_of(void** arguments, uint32_t lane) { return *static_cast<MatrixRows*>(arguments[lane]); }

// The row addresses of `count` matrices as pointers, checked; rows out of range point to `fallback`.
void resolve_rows(void** arguments, int count, bool is_store, uint8_t* fallback, uint8_t** rows, Location where) {
  const char* name = is_store ? "stmatrix" : "ldmatrix";
  for (int i = 0; i < count * 8; ++i) {
    const uint32_t address = rows_of(arguments, i).address;
    rows[i] = fallback;
    if (address % 16) {
      report("misaligned", where, "%s row address 0x%x of lane %d is not a multiple of 16 bytes", name, address, i);
      continue;
    }
    if (!shared_range_ok(address, 16, name, where)) continue;
    const uint32_t offset = address - SHARED_BASE;
    rows[i] = shared_memory() + offset;
    if (is_store)
      check_shared_write(thread_of_lane(i), offset, 16, where);
    else
      check_shared_read(thread_of_lane(i), offset, 16, where);
  }
  for (int i = 0; i < count; ++i) {  // the 8 rows of a matrix go in one pass if they fall into the 8 groups of 4 banks
    int passes = 1;
    for (int group = 0; group < 8; ++group) {
      int distinct = 0;
      for (int r = 0; r < 8; ++r) {
        const uint32_t address = rows_of(arguments, i * 8 + r).address;
        bool seen_before = address / 16 % 8 != uint32_t(group);
        for (int s = 0; s < r; ++s) seen_before |= rows_of(arguments, i * 8 + s).address == address;
        distinct += !seen_before;
      }
      passes = distinct > passes ? distinct : passes;
    }
    counts.bank_conflicts += passes - 1;
  }
}

// Lane l holds elements (l / 4, 2 (l % 4)) and the next one of each matrix; of its transpose if `transposed`.
uint16_t* element(uint8_t** rows, uint32_t lane, int half, bool transposed) {
  const uint32_t row = lane / 4, column = lane % 4 * 2 + half;
  return transposed ? reinterpret_cast<uint16_t*>(rows[column]) + row : reinterpret_cast<uint16_t*>(rows[row]) + column;
}

struct MmaOperands {
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

}  // namespace

uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t source_lane, Location where) {
  Exchange own{value, source_lane, value};
  meet("shfl", 0, mask, false, &own, where, [&](void** arguments) {
    ++counts.shuffles;
    for_each_lane(mask, [&](uint32_t lane) {
      Exchange& to = exchange_of(arguments, lane);
      if (mask >> to.source_lane & 1)
        to.result = exchange_of(arguments, to.source_lane).value;
      else
        report("collective", where, "shfl of lane %u reads lane %u, which is not in the mask 0x%x", lane, to.source_lane, mask);
    });
  });
  return own.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Location where) {
  Exchange own{predicate, 0, 0};
  meet("vote", 0, mask, false, &own, where, [&](void** arguments) {
    uint32_t votes = 0;
    for_each_lane(mask, [&](uint32_t lane) { votes |= exchange_of(arguments, lane).value << lane; });
    for_each_lane(mask, [&](uint32_t lane) { exchange_of(arguments, lane).result = votes; });
  });
  return own.result;
}

uint32_t reduce(uint32_t mask, uint32_t value, Reduction reduction, bool is_signed, Location where) {
  Exchange own{value, 0, 0};
  meet("redux", int(reduction) * 2 + is_signed, mask, false, &own, where, [&](void** arguments) {
    uint32_t result = exchange_of(arguments, __builtin_ctz(mask)).value;
    for_each_lane(mask & (mask - 1), [&](uint32_t lane) {
      const uint32_t x = exchange_of(arguments, lane).value;
      const bool less = is_signed ? int32_t(x) < int32_t(result) : x < result;
      switch (reduction) {
        case Reduction::add:
          result += x;
          break;
        case Reduction::min:
          result = less ? x : result;
          break;
        case Reduction::max:
          result = less ? result : x;
          break;
        case Reduction::and_:
          result &= x;
          break;
        case Reduction::or_:
          result |= x;
          break;
        case Reduction::xor_:
          result ^= x;
          break;
      }
    });
    for_each_lane(mask, [&](uint32_t lane) { exchange_of(arguments, lane).result = result; });
  });
  return own.result;
}

uint32_t elect(uint32_t mask, Location where) {
  Exchange own{0, 0, 0};
  meet("elect", 0, mask, false, &own, where, [&](void** arguments) {  // the same lane for the same mask, but not always the first
    uint32_t candidates = mask;
    for (uint64_t skip = launch.schedule.seed % __builtin_popcount(mask); skip; --skip) candidates &= candidates - 1;
    for_each_lane(mask, [&](uint32_t lane) { exchange_of(arguments, lane).result = __builtin_ctz(candidates); });
  });
  return own.result;
}

void syncwarp(uint32_t mask, Location where) {
  int nothing = 0;
  meet("syncwarp", 0, mask, false, &nothing, where, [&](void**) {
    static Knowledge knowledge;
    clear(knowledge);
    for_each_lane(mask, [&](uint32_t lane) { release(thread_of_lane(lane), knowledge); });
    for_each_lane(mask, [&](uint32_t lane) { acquire(thread_of_lane(lane), knowledge); });
  });
}

void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t address, Location where) {
  MatrixRows own{registers, address};
  meet("ldmatrix", count * 2 + transposed, ALL_LANES, true, &own, where, [&](void** arguments) {
    ++counts.ldmatrix;
    uint16_t nans[8];
    memcpy(nans, OUT_OF_RANGE, sizeof nans);
    uint8_t* rows[32];
    resolve_rows(arguments, count, false, reinterpret_cast<uint8_t*>(nans), rows, where);
    for (uint32_t lane = 0; lane < 32; ++lane)
      for (int i = 0; i < count; ++i)
        rows_of(arguments, lane).registers[i] =
            *element(rows + i * 8, lane, 0, transposed) | uint32_t(*element(rows + i * 8, lane, 1, transposed)) << 16;
  });
}

void stmatrix(const uint32_t* registers, int count, bool transposed, uint32_t address, Location where) {
  MatrixRows own{const_cast<uint32_t*>(registers), address};
  meet("stmatrix", count * 2 + transposed, ALL_LANES, true, &own, where, [&](void** arguments) {
    uint16_t nowhere[8];
    uint8_t* rows[32];
    resolve_rows(arguments, count, true, reinterpret_cast<uint8_t*>(nowhere), rows, where);
    for (uint32_t lane = 0; lane < 32; ++lane)
      for (int i = 0; i < count; ++i) {
        const uint32_t value = rows_of(arguments, lane).registers[i];
        *element(rows + i * 8, lane, 0, transposed) = uint16_t(value);
        *element(rows + i * 8, lane, 1, transposed) = uint16_t(value >> 16);
      }
  });
}

uint32_t movmatrix_transposed(uint32_t value, Location where) {
  Exchange own{value, 0, 0};
  meet("movmatrix", 0, ALL_LANES, true, &own, where, [&](void** arguments) {
    uint16_t matrix[8][8];
    for (uint32_t lane = 0; lane < 32; ++lane) memcpy(&matrix[lane / 4][lane % 4 * 2], &exchange_of(arguments, lane).value, 4);
    for (uint32_t lane = 0; lane < 32; ++lane)
      exchange_of(arguments, lane).result = matrix[lane % 4 * 2][lane / 4] | uint32_t(matrix[lane % 4 * 2 + 1][lane / 4]) << 16;
  });
  return own.result;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16": with g = lane / 4 and q = 2 (lane % 4), a lane holds
// A (g + 8 (i % 2), q + 8 (i / 2)) and its right neighbour in register i, B (q + 8 i, g) and the one below in register i,
// C and D (g, q), (g, q + 1), (g + 8, q), (g + 8, q + 1).
void mma(MmaShape shape, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, Location where) {
  MmaOperands own{d, a, b, c};
  meet("mma", shape.k * 4 + int(shape.type) * 2 + shape.half_accumulator, ALL_LANES, true, &own, where, [&](void** arguments) {
    ++counts.mma;
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaOperands& x = *static_cast<MmaOperands*>(arguments[lane]);
      const int g = lane / 4, q = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < shape.k / 4; ++i) A[g + i % 2 * 8][q + i / 2 * 8 + half] = to_float(x.a[i] >> 16 * half, shape.type);
        for (int i = 0; i < shape.k / 8; ++i) B[q + i * 8 + half][g] = to_float(x.b[i] >> 16 * half, shape.type);
        for (int i = 0; i < 2; ++i)
          C[g + i * 8][q + half] = shape.half_accumulator ? to_float(x.c[i] >> 16 * half, Float16::f16) : float_of_bits(x.c[2 * i + half]);
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < shape.k; ++k)
        for (int column = 0; column < 8; ++column) C[row][column] += A[row][k] * B[k][column];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaOperands& x = *static_cast<MmaOperands*>(arguments[lane]);
      const int g = lane / 4, q = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        const float* pair = &C[g + i * 8][q];
        if (shape.half_accumulator) {
          x.d[i] = f16_of_float(pair[0]) | f16_of_float(pair[1]) << 16;
        } else {
          x.d[2 * i] = bits_of_float(pair[0]);
          x.d[2 * i + 1] = bits_of_float(pair[1]);
        }
      }
    }
  });
}

void setmaxnreg(int count, bool increase, Location where) {
  int nothing = 0;
  meet(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", count, ALL_LANES, true, &nothing, where, [](void**) {});
  if (current->lane || !launch.registers_per_thread) return;
  int64_t& register_pool = running->warp_operations->register_pool;
  int& registers = running->warp_operations->registers[current->warp];
  if (count % 8 || count < 24 || count > 256) report("setmaxnreg", where, "%d registers: not a multiple of 8 in [24, 256]", count);
  if (increase ? count < registers : count > registers)
    report("setmaxnreg", where, "%s to %d registers, but the warp has %d", increase ? "increase" : "decrease", count, registers);
  if (increase) {
    while (register_pool < (count - registers) * 32) block_current(POOL_EMPTY, where, count, uint32_t(register_pool));
    register_pool -= (count - registers) * 32;
  } else {
    register_pool += (registers - count) * 32;
    for (Thread& thread : running->threads)
      if (thread.waits_for == POOL_EMPTY) set_runnable(thread);
  }
  registers = count;
}

void begin_block_warp_operations(Block& block) {
  if (!block.warp_operations) block.warp_operations = std::make_shared<WarpOperations>();
  WarpOperations& operations = *block.warp_operations;
  operations.meetings.assign(launch.num_warps, WarpMeetings{});
  constexpr int64_t REGISTERS_PER_SM = 65536;
  const int per_thread = (launch.registers_per_thread + 7) / 8 * 8;
  operations.register_pool = launch.registers_per_thread ? REGISTERS_PER_SM - int64_t(per_thread) * launch.num_threads : 0;
  operations.registers.assign(launch.num_warps, launch.registers_per_thread);
}

std::string explain_warp_wait(const Thread& thread) {
  if (!thread.waits_for) return "";
  for (const Meeting& meeting : thread.block->warp_operations->meetings[thread.warp].slots)
    if (meeting.arrived >> thread.lane & 1) {
      char text[64];
      snprintf(text, sizeof text, " -- waits for lanes %08x", meeting.mask & ~meeting.arrived);
      return text;
    }
  return "";
}

}  // namespace emulator
