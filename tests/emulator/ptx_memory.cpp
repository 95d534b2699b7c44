#include "ptx_memory.h"

#include <cstring>

#include "global_memory.h"
#include "global_races.h"
#include "number_formats.h"
#include "polling.h"
#include "ptx_interpreter.h"
#include "shared_memory.h"

namespace emulator {
namespace {

// Where an access goes; null if it is out of range, which has then been reported.
struct Place {
  Space space;
  uint8_t* pointer;
};

// Generic addresses are pointers of this process; shared memory has them too.
bool is_shared_pointer(uint64_t address) { return address - uint64_t(shared_memory()) < shared_size(); }

bool in_frames(const PtxThread& thread, uint64_t address, uint32_t bytes) {
  for (const auto& frame : thread.frames)
    if (address - uint64_t(frame->memory.get()) < frame->function->frame_bytes)
      return address + bytes <= uint64_t(frame->memory.get()) + frame->function->frame_bytes;
  return false;
}

bool in_kernel_parameters(const PtxThread& thread, uint64_t address) {
  return address - uint64_t(thread.kernel_parameters) < thread.kernel_parameter_bytes;
}

Place find_place(const PtxThread& thread, const Instruction& i, uint64_t address, uint32_t bytes, const char* what) {
  Space space = i.space;
  if (space == Space::generic) {
    if (is_shared_pointer(address)) {
      space = Space::shared;
      address = address - uint64_t(shared_memory()) + SHARED_BASE;
    } else {
      space = in_kernel_parameters(thread, address) ? Space::param : in_frames(thread, address, 1) ? Space::local : Space::global;
    }
  }
  uint8_t* pointer = reinterpret_cast<uint8_t*>(address);
  switch (space) {
    case Space::shared:
      if (!shared_range_ok(uint32_t(address), bytes, what, i.where)) return {space, nullptr};
      return {space, shared_memory() + uint32_t(address) - SHARED_BASE};
    case Space::local:
    case Space::param:
      if (in_frames(thread, address, bytes)) return {space, pointer};
      if (in_kernel_parameters(thread, address) && in_kernel_parameters(thread, address + bytes - 1)) return {space, pointer};
      report("local-oob", i.where, "%s of %u bytes outside the thread's local memory and parameters", what, bytes);
      return {space, nullptr};
    default:
      return {space, global_range_ok(pointer, bytes, what, i.where) ? pointer : nullptr};
  }
}

// A misaligned access is reported and goes to the aligned address below.
uint64_t aligned_address(const Instruction& i, const Operand& operand, const uint64_t* cells, uint32_t bytes, const char* what) {
  const uint64_t address = cells[operand.cells[0]] + uint64_t(operand.offset);
  if (address % bytes == 0) return address;
  report("misaligned", i.where, "%s of %u bytes at address 0x%llx", what, bytes, (unsigned long long)address);
  return address / bytes * bytes;
}

GlobalAccess access_of(const Instruction& i, Effect effect) { return i.gpu_scope ? strong_access(effect, i.order) : plain_access(effect); }

void load(const PtxThread& thread, const Instruction& i, uint64_t* cells) {
  const uint32_t size = size_of(i.type), bytes = size * i.vector;
  const std::vector<uint32_t>& to = i.operands[0].cells;
  const Place place = find_place(thread, i, aligned_address(i, i.operands[1], cells, bytes, "load"), bytes, "load");
  if (!place.pointer) {
    for (uint32_t cell : to) cells[cell] = ~0ull;
    return;
  }
  if (place.space == Space::shared) check_shared_read(*current, uint32_t(place.pointer - shared_memory()), bytes, i.where);
  if (place.space == Space::global) {
    check_global_access(place.pointer, bytes, access_of(i, Effect::read), i.where);
    if (i.gpu_scope) strong_read(uint64_t(place.pointer), i.order);
  }
  for (uint32_t k = 0; k < i.vector; ++k) {
    uint64_t value = 0;
    memcpy(&value, place.pointer + k * size, size);
    cells[to[k]] = is_signed(i.type) ? uint64_t(extended(value, i.type)) : value;
  }
  if (i.order != Order::weak) note_poll(place.pointer, cells[to[0]], i.where);
}

void store(const PtxThread& thread, const Instruction& i, uint64_t* cells) {
  const uint32_t size = size_of(i.type), bytes = size * i.vector;
  const Place place = find_place(thread, i, aligned_address(i, i.operands[0], cells, bytes, "store"), bytes, "store");
  if (!place.pointer) return;
  uint8_t data[40];
  for (uint32_t k = 0; k < i.vector; ++k) memcpy(data + k * size, &cells[i.operands[1].cells[k]], 8);
  if (place.space == Space::shared) check_shared_write(*current, uint32_t(place.pointer - shared_memory()), bytes, i.where, data);
  if (place.space == Space::global) {
    check_global_access(place.pointer, bytes, access_of(i, Effect::write), i.where);
    if (i.gpu_scope)
      strong_write(uint64_t(place.pointer), i.order);
    else
      weak_write(uint64_t(place.pointer), bytes);
  }
  memcpy(place.pointer, data, bytes);
  if (place.space == Space::global || place.space == Space::shared) ++progress;
}

uint64_t add(uint64_t a, uint64_t b, Type type) {
  if (type == Type::f32) return bits_of_float(float_of_bits(a) + float_of_bits(b));
  if (type == Type::f64) return bits_of_double(double_of_bits(a) + double_of_bits(b));
  if (!is_half(type)) return a + b;
  uint64_t sum = 0;
  for (int half = 0; half < int(size_of(type)) / 2; ++half)
    sum |= double_to_half(half_to_double(a, type, half) + half_to_double(b, type, half), type) << 16 * half;
  return sum;
}

uint64_t apply(const Instruction& i, uint64_t old, uint64_t operand, uint64_t replacement) {
  const int64_t a = extended(old, i.type), b = extended(operand, i.type);
  const bool less = is_signed(i.type) ? b < a : uint64_t(b) < uint64_t(a);
  switch (i.atomic) {
    case AtomicKind::add:
      return add(old, operand, i.type);
    case AtomicKind::min:
      return less ? operand : old;
    case AtomicKind::max:
      return less ? old : operand;
    case AtomicKind::exch:
      return operand;
    case AtomicKind::cas:
      return a == b ? replacement : old;
    case AtomicKind::and_:
      return old & operand;
    case AtomicKind::or_:
      return old | operand;
    case AtomicKind::xor_:
      return old ^ operand;
    case AtomicKind::inc:
      return uint64_t(a) >= uint64_t(b) ? 0 : old + 1;
    default:
      return a == 0 || uint64_t(a) > uint64_t(b) ? operand : old - 1;
  }
}

// Only one thread runs at a time, which makes it atomic.
void atomic(const PtxThread& thread, const Instruction& i, uint64_t* cells) {
  const int k = i.flag ? 1 : 0;  // atom returns the old value, red does not
  const uint32_t size = size_of(i.type), bytes = size * i.vector;
  const Place place = find_place(thread, i, aligned_address(i, i.operands[k], cells, bytes, "atomic"), bytes, "atomic");
  if (!place.pointer) return;
  const bool adds_floats = i.atomic == AtomicKind::add && (is_half(i.type) || i.type == Type::f32 || i.type == Type::f64);
  if (place.space == Space::global)
    check_global_access(place.pointer, bytes, access_of(i, adds_floats ? Effect::addition : Effect::write), i.where);
  const uint64_t replacement = i.atomic == AtomicKind::cas ? cells[i.cell[k + 2]] : 0;
  uint64_t old = 0;
  bool changed = false;
  for (uint32_t element = 0; element < i.vector; ++element) {
    memcpy(&old, place.pointer + element * size, size);
    const uint64_t result = apply(i, old, cells[i.operands[k + 1].cells[element]], replacement);
    changed |= memcmp(&old, &result, size) != 0;
    memcpy(place.pointer + element * size, &result, size);
    if (i.flag) cells[i.operands[0].cells[element]] = old;
  }
  const bool writes = i.atomic != AtomicKind::cas || old == truncated(cells[i.operands[k + 1].cells[0]], i.type);
  if (i.gpu_scope && place.space == Space::global) strong_update(uint64_t(place.pointer), i.order, writes);
  if (changed)
    ++progress;
  else if (i.flag)
    note_poll(place.pointer, old, i.where);
}

// Between the generic address space, where addresses are pointers, and the shared one; the others are the same as generic.
void convert_address(const Instruction& i, uint64_t* cells) {
  uint64_t address = cells[i.cell[1]];
  if (i.space == Space::shared) {
    const uint64_t base = uint64_t(shared_memory()) - SHARED_BASE;
    address = i.flag ? address - base : base + uint32_t(address);
  }
  cells[i.cell[0]] = address;
}

}  // namespace

void execute_memory(const PtxThread& thread, const Instruction& i, uint64_t* cells) {
  switch (i.opcode) {
    case Opcode::load:
      return load(thread, i, cells);
    case Opcode::store:
      return store(thread, i, cells);
    case Opcode::atomic:
      return atomic(thread, i, cells);
    case Opcode::cvta:
      return convert_address(i, cells);
    default: {
      const uint64_t address = cells[i.cell[1]];
      const bool shared = is_shared_pointer(address), local = in_frames(thread, address, 1), param = in_kernel_parameters(thread, address);
      cells[i.cell[0]] = i.space == Space::shared  ? shared
                         : i.space == Space::local ? local
                         : i.space == Space::param ? param
                                                   : !shared && !local && !param;
    }
  }
}

}  // namespace emulator
