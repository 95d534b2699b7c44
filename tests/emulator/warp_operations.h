// What the 32 threads of a warp do together: shuffles, votes, reductions, matrix loads and stores, mma.sync.
// The first lanes to arrive wait; the last one computes for all.
#pragma once
#include <cstdint>

#include "report.h"
#include "scheduler.h"

namespace emulator {

enum class Float16 : uint8_t { bf16, f16 };  // the 16-bit formats of matrix operands

uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t source_lane, Location);
uint32_t ballot(uint32_t mask, bool predicate, Location);
enum class Reduction : uint8_t { add, min, max, and_, or_, xor_ };
uint32_t reduce(uint32_t mask, uint32_t value, Reduction, bool is_signed, Location);
uint32_t elect(uint32_t mask, Location);  // the elected lane
void syncwarp(uint32_t mask, Location);

// `count` 8x8 matrices of 16-bit elements; lane 8 i + r holds the address of row r of matrix i.
void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t address, Location);
void stmatrix(const uint32_t* registers, int count, bool transposed, uint32_t address, Location);
uint32_t movmatrix_transposed(uint32_t value, Location);

// D = A B + C of m16n8kK: K = 8 or 16. The accumulators are float32, or float16 in pairs.
struct MmaShape {
  int k;
  Float16 type;
  bool half_accumulator;
};
void mma(MmaShape, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, Location);

// setmaxnreg: registers move between a warpgroup's warps and the pool of the block.
void setmaxnreg(int count, bool increase, Location);

void begin_block_warp_operations(Block&);
std::string explain_warp_wait(const Thread&);

}  // namespace emulator
