// Operands of an instruction, read from and written to the cells of its frame.
#pragma once
#include <algorithm>
#include <cmath>

#include "number_formats.h"
#include "ptx_program.h"

namespace emulator {

using Cells = uint64_t*;
using I = const Instruction;  // an instruction being executed, everywhere below

inline uint64_t operand(I& i, Cells cells, int k) { return cells[i.cell[k]]; }
inline bool predicate(I& i, Cells cells, int k) { return (cells[i.cell[k]] & 1) != i.operands[k].negated; }
inline void set(I& i, Cells cells, uint64_t value) { cells[i.cell[0]] = value; }

inline float float_operand(I& i, Cells cells, int k) {
  const float value = float_of_bits(operand(i, cells, k));
  return i.flush ? flush(value) : value;
}

inline void set_float(I& i, Cells cells, float value) {
  if (i.saturate) value = std::isnan(value) ? 0 : std::clamp(value, 0.0f, 1.0f);
  set(i, cells, bits_of_float(i.flush ? flush(value) : value));
}

inline uint64_t low_bits(uint64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

}  // namespace emulator
