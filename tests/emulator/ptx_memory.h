// Loads, stores and atomics; and a thread's frames, in whose memory its local variables and the arguments of its calls live.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "ptx_program.h"
#include "wgmma.h"

namespace emulator {

struct Frame {
  const Function* function;
  int next = 0;  // instruction
  std::vector<uint64_t> cells;
  std::unique_ptr<uint8_t[]> memory;
};

struct PtxThread {
  std::vector<std::unique_ptr<Frame>> frames;
  const uint8_t* kernel_parameters = nullptr;
  uint32_t kernel_parameter_bytes = 0;
  // Accumulators of wgmma by slot, the registers (cell, number) that hold the tokens of each, and how many are in flight.
  std::deque<Accumulator> accumulators;
  std::vector<std::vector<std::pair<uint32_t, int>>> homes;
  int flying = 0;
};

void execute_memory(const PtxThread&, const Instruction&, uint64_t* cells);

}  // namespace emulator
