// wgmma: asynchronous matrix products of a warpgroup (128 threads), from shared memory or registers into register accumulators.
//
// From its issue until wgmma.wait_group an accumulator belongs to the hardware. The emulator takes the values out of the threads'
// registers at issue and gives them back at the wait. What the registers hold meanwhile is the interpreter's concern.
#pragma once
#include <cstdint>
#include <deque>

#include "report.h"
#include "warp_operations.h"

namespace emulator {

constexpr int MAX_WGMMA_N = 256;
constexpr int MAX_ACCUMULATORS = MAX_WGMMA_N / 2;  // floats per thread

struct WgmmaShape {
  int n;
  Float16 type;
  bool half_accumulator;  // rounded to float16 after every product
  bool a_in_registers;
  bool a_transposed, b_transposed;  // MN-major in shared memory
  bool scale_d;                     // false: D = A B
  int8_t scale_a, scale_b;          // 1 or -1
};

// One thread's share of an accumulator in flight.
struct Accumulator {
  bool active = false;
  bool touched = false;  // its registers were changed while in flight
  bool half = false;     // float16, two to a register
  int n = 0;
  float values[MAX_ACCUMULATORS];
};

void wgmma_fence(Location);
// `slot` numbers the accumulators in flight of the thread; all threads of the warpgroup must agree on it.
void wgmma(const WgmmaShape&, Accumulator&, int slot, const uint32_t* a_registers, uint64_t a_descriptor, uint64_t b_descriptor, Location);
void wgmma_commit(Location);
// Ends all but the latest groups; finished ones of this thread's accumulators (by slot) become inactive and hold the results.
void wgmma_wait(uint32_t groups_left, std::deque<Accumulator>& accumulators, Location);

void begin_block_wgmma(Block&);
void check_wgmma_at_exit();

}  // namespace emulator
