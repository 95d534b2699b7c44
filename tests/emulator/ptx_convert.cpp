// Values as the types of PTX see them, and conversions between the types.
#include <algorithm>
#include <cmath>

#include "number_formats.h"
#include "ptx_cells.h"
#include "ptx_interpreter.h"

namespace emulator {

int64_t extended(uint64_t value, Type type) {
  switch (type) {
    case Type::s8:
      return int8_t(value);
    case Type::s16:
      return int16_t(value);
    case Type::s32:
      return int32_t(value);
    case Type::pred:
      return value & 1;
    default:
      return int64_t(truncated(value, type));
  }
}

uint64_t truncated(uint64_t value, Type type) {
  switch (size_of(type)) {
    case 1:
      return uint8_t(value);
    case 2:
      return uint16_t(value);
    case 4:
      return type == Type::pred ? value & 1 : uint32_t(value);
    default:
      return value;
  }
}

double half_to_double(uint64_t value, Type type, int half) {
  const uint32_t bits = uint32_t(value >> 16 * half) & 0xffff;
  return type == Type::f16 || type == Type::f16x2 ? float_of_f16(bits) : float_of_bf16(bits);
}

uint64_t double_to_half(double value, Type type) {
  return type == Type::f16 || type == Type::f16x2 ? f16_of_double(value) : bf16_of_float(float(value));
}

void convert(I& i, Cells cells) {
  const Type to = i.type, from = i.type2;
  if (to == Type::bf16x2 || to == Type::f16x2) {  // the first operand becomes the high half
    const uint64_t high = double_to_half(float_of_bits(operand(i, cells, 1)), to),
                   low = double_to_half(float_of_bits(operand(i, cells, 2)), to);
    return set(i, cells, low | high << 16);
  }
  const bool to_float_type = to == Type::f32 || to == Type::f64 || is_half(to);
  const bool from_float_type = from == Type::f32 || from == Type::f64 || is_half(from);
  const int64_t integer = extended(operand(i, cells, 1), from);
  if (!from_float_type && !to_float_type) {
    if (!i.saturate) return set(i, cells, truncated(uint64_t(integer), to));
    const int bits = int(size_of(to)) * 8;
    const int64_t low = is_signed(to) ? -(1ll << (bits - 1)) : 0, high = bits == 64      ? INT64_MAX
                                                                         : is_signed(to) ? (1ll << (bits - 1)) - 1
                                                                                         : (1ll << bits) - 1;
    return set(i, cells, truncated(uint64_t(std::clamp(integer, low, high)), to));
  }
  double value;
  if (from == Type::f32) {
    value = float_operand(i, cells, 1);
  } else if (from == Type::f64) {
    value = double_of_bits(operand(i, cells, 1));
  } else if (is_half(from)) {
    value = half_to_double(operand(i, cells, 1), from, 0);
  } else if (to == Type::f32) {  // directly: through double, 64-bit integers would be rounded twice
    return set_float(i, cells, is_signed(from) ? float(integer) : float(uint64_t(integer)));
  } else {
    value = is_signed(from) ? double(integer) : double(uint64_t(integer));
  }
  switch (i.rounding) {
    case Rounding::zero:
      value = std::trunc(value);
      break;
    case Rounding::nearest:
      value = std::nearbyint(value);
      break;
    case Rounding::down:
      value = std::floor(value);
      break;
    case Rounding::up:
      value = std::ceil(value);
      break;
    default:
      break;
  }
  if (to == Type::f32) return set_float(i, cells, float(value));
  if (to == Type::f64) return set(i, cells, bits_of_double(value));
  if (is_half(to)) return set(i, cells, double_to_half(i.saturate ? std::clamp(value, 0.0, 1.0) : value, to));
  // To an integer: out of range clamps, NaN becomes 0.
  const double limit = std::ldexp(1.0, int(size_of(to)) * 8 - is_signed(to));
  uint64_t bits;
  if (std::isnan(value))
    bits = 0;
  else if (value >= limit)
    bits = is_signed(to) ? low_bits(size_of(to) * 8 - 1) : ~0ull;
  else if (value <= (is_signed(to) ? -limit : 0.0))
    bits = is_signed(to) ? 1ull << (size_of(to) * 8 - 1) : 0;
  else
    bits = is_signed(to) ? uint64_t(int64_t(value)) : uint64_t(value);
  set(i, cells, truncated(bits, to));
}

}  // namespace emulator
