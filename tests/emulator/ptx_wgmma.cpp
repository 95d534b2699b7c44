#include "ptx_wgmma.h"

#include "number_formats.h"
#include "wgmma.h"

namespace emulator {
namespace {

// While an accumulator is in flight its registers hold tokens: NaNs that name the accumulator and the register. They survive the
// copies between registers that compilers put there, and every copy receives the result.
constexpr uint32_t TOKEN = 0x7fd00000;
uint32_t token(int slot, int element) { return TOKEN | uint32_t(slot) << 8 | uint32_t(element); }
bool is_token(uint64_t value) { return uint32_t(value) >> 20 == TOKEN >> 20; }
int slot_of(uint64_t token) { return int(token >> 8 & 0xfff); }

int free_slot(PtxThread& thread) {
  for (size_t slot = 0; slot < thread.accumulators.size(); ++slot)
    if (!thread.accumulators[slot].active) return int(slot);
  thread.accumulators.emplace_back();
  thread.homes.emplace_back();
  return int(thread.accumulators.size() - 1);
}

}  // namespace

// An instruction other than a copy that reads registers of an accumulator in flight.
void check_reads_no_token(const PtxThread& thread, const Instruction& i, const uint64_t* cells) {
  for (size_t k = 1; k < i.operands.size(); ++k)
    for (uint32_t cell : i.operands[k].cells)
      if (is_token(cells[cell]) && slot_of(cells[cell]) < int(thread.accumulators.size()) &&
          thread.accumulators[slot_of(cells[cell])].active)
        report("acc-touched", i.where, "reads an accumulator register while a wgmma on it is in flight");
}

// A copy of a token: the destination becomes one more home of that register.
void note_copied_token(PtxThread& thread, const Instruction& i, uint64_t value) {
  const int slot = slot_of(value);
  if (is_token(value) && slot < int(thread.homes.size()) && thread.accumulators[slot].active)
    thread.homes[slot].push_back({i.cell[0], int(value & 255)});
}

void start_wgmma(PtxThread& thread, const Instruction& i, uint64_t* cells) {
  const std::vector<uint32_t>& d = i.operands[0].cells;
  const bool half = i.types[0] == Type::f16;
  const uint64_t first = cells[d[0]];
  const bool continues = is_token(first) && slot_of(first) < int(thread.accumulators.size()) && thread.accumulators[slot_of(first)].active;
  const int slot = continues ? slot_of(first) : free_slot(thread);
  Accumulator& accumulator = thread.accumulators[slot];
  if (!continues) {
    accumulator = Accumulator{};
    accumulator.active = true;
    accumulator.half = half;
    accumulator.n = i.variant;
    ++thread.flying;
    for (size_t r = 0; r < d.size(); ++r) {
      const uint64_t bits = cells[d[r]];
      if (half) {
        accumulator.values[2 * r] = float_of_f16(uint32_t(bits));
        accumulator.values[2 * r + 1] = float_of_f16(uint32_t(bits >> 16));
      } else {
        accumulator.values[r] = float_of_bits(bits);
      }
    }
  } else {
    for (size_t r = 0; r < d.size(); ++r) accumulator.touched |= uint32_t(cells[d[r]]) != token(slot, int(r));
  }
  thread.homes[slot].clear();
  for (size_t r = 0; r < d.size(); ++r) {
    cells[d[r]] = token(slot, int(r));
    thread.homes[slot].push_back({d[r], int(r)});
  }
  // d, a, b, scale-d, imm-scale-a, imm-scale-b [, trans-a] [, trans-b]
  const bool a_in_registers = i.operands[1].cells.size() == 4;
  const auto value = [&](size_t k) { return k < i.operands.size() ? cells[i.operands[k].cells[0]] : 0; };
  WgmmaShape shape{i.variant,
                   i.types[1] == Type::f16 ? Float16::f16 : Float16::bf16,
                   half,
                   a_in_registers,
                   false,
                   false,
                   bool(value(3) & 1),
                   int8_t(value(4)),
                   int8_t(value(5))};
  if (!a_in_registers) shape.a_transposed = value(6);
  shape.b_transposed = value(a_in_registers ? 6 : 7);
  uint32_t a_registers[4] = {};
  for (int r = 0; a_in_registers && r < 4; ++r) {
    a_registers[r] = uint32_t(cells[i.operands[1].cells[r]]);
    if (is_token(a_registers[r])) report("acc-touched", i.where, "an A register holds an accumulator that is in flight");
  }
  wgmma(shape, accumulator, slot, a_in_registers ? a_registers : nullptr, a_in_registers ? 0 : value(1), value(2), i.where);
}

void wait_wgmma(PtxThread& thread, const Instruction& i, uint64_t* cells) {
  std::vector<bool> was_active;
  for (const Accumulator& accumulator : thread.accumulators) was_active.push_back(accumulator.active);
  wgmma_wait(uint32_t(cells[i.cell[0]]), thread.accumulators, i.where);
  for (size_t slot = 0; slot < was_active.size(); ++slot) {
    const Accumulator& accumulator = thread.accumulators[slot];
    if (!was_active[slot] || accumulator.active) continue;
    --thread.flying;
    for (const auto& [cell, element] : thread.homes[slot]) {
      if (uint32_t(cells[cell]) != token(int(slot), element)) continue;  // the register has moved on to hold something else
      const float* v = accumulator.values;
      cells[cell] = accumulator.half ? f16_of_float(v[2 * element]) | f16_of_float(v[2 * element + 1]) << 16 : bits_of_float(v[element]);
    }
  }
}

}  // namespace emulator
