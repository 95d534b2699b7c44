// Executes PTX: each CUDA thread is a fiber that runs run_ptx_thread().
#pragma once
#include <cstdint>

#include "ptx_program.h"
#include "scheduler.h"

namespace emulator {

// Instructions that compute from cells to cells.
void execute_arithmetic(const Instruction&, uint64_t* cells);
void convert(const Instruction&, uint64_t* cells);  // cvt

// An integer of this type, extended to 64 bits; and the bits of a value that it keeps.
int64_t extended(uint64_t value, Type);
uint64_t truncated(uint64_t value, Type);
// The same for numbers of the 16-bit floating-point formats, alone or in pairs: f applied to each half.
inline bool is_half(Type type) { return type == Type::f16 || type == Type::bf16 || type == Type::f16x2 || type == Type::bf16x2; }
double half_to_double(uint64_t value, Type, int half);
uint64_t double_to_half(double value, Type);

// What the threads of the current launch run.
void begin_ptx_launch(const Module&, const Function& entry, const uint8_t* parameters);
void begin_ptx_block(Block&);
void run_ptx_thread();

}  // namespace emulator
