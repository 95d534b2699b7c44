#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdlib>

#include "number_formats.h"
#include "ptx_cells.h"
#include "ptx_interpreter.h"

namespace emulator {
namespace {

// compute(a, b, c) on as many operands as the instruction has, in the type that the instruction names.
template <class Float, class Integer>
void compute(I& i, Cells cells, Float&& on_floats, Integer&& on_integers) {
  const int operands = int(i.operands.size()) - 1;
  if (i.type == Type::f32) {
    float x[3] = {};
    for (int k = 0; k < operands; ++k) x[k] = float_operand(i, cells, k + 1);
    set_float(i, cells, on_floats(x[0], x[1], x[2]));
  } else if (i.type == Type::f64) {
    double x[3] = {};
    for (int k = 0; k < operands; ++k) x[k] = double_of_bits(operand(i, cells, k + 1));
    set(i, cells, bits_of_double(on_floats(x[0], x[1], x[2])));
  } else if (is_half(i.type)) {  // in double, then rounded once
    uint64_t result = 0;
    for (int half = 0; half < int(size_of(i.type)) / 2; ++half) {
      double x[3] = {};
      for (int k = 0; k < operands; ++k) x[k] = half_to_double(operand(i, cells, k + 1), i.type, half);
      result |= double_to_half(on_floats(x[0], x[1], x[2]), i.type) << 16 * half;
    }
    set(i, cells, result);
  } else {
    int64_t x[3] = {};
    for (int k = 0; k < operands; ++k) x[k] = extended(operand(i, cells, k + 1), i.type);
    set(i, cells, truncated(uint64_t(on_integers(x[0], x[1], x[2])), i.type));
  }
}

// One definition for float and double.
#define FLOATS(expression) [&](auto a, [[maybe_unused]] auto b, [[maybe_unused]] auto c) -> decltype(a) { return expression; }
#define INTEGERS(expression) \
  [&]([[maybe_unused]] int64_t a, [[maybe_unused]] int64_t b, [[maybe_unused]] int64_t c) -> int64_t { return expression; }

int64_t clip(int64_t value, bool relu) { return relu && value < 0 ? 0 : value; }
bool less(int64_t a, int64_t b, Type type) { return is_signed(type) ? a < b : uint64_t(a) < uint64_t(b); }

template <class T>
T minimum(T a, T b, bool nan_wins) {
  if (nan_wins && (std::isnan(a) || std::isnan(b))) return std::nan("");
  return std::fmin(a, b);
}
template <class T>
T maximum(T a, T b, bool nan_wins) {
  if (nan_wins && (std::isnan(a) || std::isnan(b))) return std::nan("");
  return std::fmax(a, b);
}

uint64_t high_product(int64_t a, int64_t b, Type type) {
  if (type == Type::s32) return uint32_t(a * b >> 32);
  if (size_of(type) == 4) return uint64_t(a) * uint64_t(b) >> 32;
  return type == Type::s64 ? uint64_t(__int128(a) * b >> 64) : uint64_t((unsigned __int128)(uint64_t(a)) * uint64_t(b) >> 64);
}

// Division by zero gives all ones, as on the GPU.
int64_t divide(int64_t a, int64_t b, Type type) {
  if (b == 0) return -1;
  if (is_signed(type)) return b == -1 ? int64_t(0 - uint64_t(a)) : a / b;
  return int64_t(uint64_t(a) / uint64_t(b));
}
int64_t remainder(int64_t a, int64_t b, Type type) {
  if (b == 0) return a;
  if (is_signed(type)) return b == -1 ? 0 : a % b;
  return int64_t(uint64_t(a) % uint64_t(b));
}

template <class T>
bool compare_values(T a, T b, Comparison comparison) {
  switch (comparison) {
    case Comparison::eq:
      return a == b;
    case Comparison::ne:
      return a != b;
    case Comparison::lt:
      return a < b;
    case Comparison::le:
      return a <= b;
    case Comparison::gt:
      return a > b;
    default:
      return a >= b;
  }
}

void set_predicate(I& i, Cells cells) {
  bool result;
  if (i.type == Type::f32 || i.type == Type::f64 || is_half(i.type)) {
    double x[2];
    for (int k = 0; k < 2; ++k)
      x[k] = i.type == Type::f32   ? float_operand(i, cells, k + 1)
             : i.type == Type::f64 ? double_of_bits(operand(i, cells, k + 1))
                                   : half_to_double(operand(i, cells, k + 1), i.type, 0);
    const bool has_nan = std::isnan(x[0]) || std::isnan(x[1]);
    if (i.comparison == Comparison::num)
      result = !has_nan;
    else if (i.comparison == Comparison::nan)
      result = has_nan;
    else
      result = has_nan ? i.unordered : compare_values(x[0], x[1], i.comparison);
  } else {
    const int64_t a = extended(operand(i, cells, 1), i.type), b = extended(operand(i, cells, 2), i.type);
    result = is_signed(i.type) ? compare_values(a, b, i.comparison) : compare_values(uint64_t(a), uint64_t(b), i.comparison);
  }
  const auto combined = [&](bool value) {
    switch (i.combination) {
      case Combination::and_:
        return value && predicate(i, cells, 3);
      case Combination::or_:
        return value || predicate(i, cells, 3);
      case Combination::xor_:
        return value != predicate(i, cells, 3);
      default:
        return value;
    }
  };
  const bool first = combined(result), second = combined(!result);
  cells[i.cell[0]] = first;
  if (i.operands[0].cells.size() > 1) cells[i.operands[0].cells[1]] = second;
}

// Between a scalar and the elements of a vector, or a plain copy.
void move(I& i, Cells cells) {
  const auto &to = i.operands[0].cells, &from = i.operands[1].cells;
  const uint32_t bits = size_of(i.type) * 8;
  if (to.size() > 1) {
    const uint32_t width = bits / uint32_t(to.size());
    const uint64_t value = operand(i, cells, 1);
    for (size_t k = 0; k < to.size(); ++k) cells[to[k]] = value >> width * k & ((1ull << width) - 1);
  } else if (from.size() > 1) {
    const uint32_t width = bits / uint32_t(from.size());
    uint64_t value = 0;
    for (size_t k = 0; k < from.size(); ++k) value |= (cells[from[k]] & ((1ull << width) - 1)) << width * k;
    set(i, cells, value);
  } else {
    set(i, cells, truncated(operand(i, cells, 1), i.type));
  }
}

uint64_t insert_bits(uint64_t from, uint64_t into, uint32_t position, uint32_t length, Type type) {
  if (position >= size_of(type) * 8) return into;
  const uint64_t mask = low_bits(length) << position;
  return truncated((into & ~mask) | (from << position & mask), type);
}

uint64_t extract_bits(uint64_t from, uint32_t position, uint32_t length, Type type) {
  uint64_t value = position > 63 ? 0 : truncated(from, type) >> position & low_bits(length);
  if (is_signed(type) && length && length < 64 && value >> (length - 1) & 1) value |= ~low_bits(length);
  return truncated(value, type);
}

uint64_t find_leading(uint64_t value, Type type, bool as_shift) {
  const int64_t x = extended(value, type);
  const uint64_t searched = truncated(is_signed(type) && x < 0 ? ~uint64_t(x) : uint64_t(x), type);
  if (!searched) return 0xffffffff;
  const uint32_t bit = 63 - __builtin_clzll(searched);
  return as_shift ? size_of(type) * 8 - 1 - bit : bit;
}

uint64_t reverse_bits(uint64_t value, Type type) {
  uint64_t result = 0;
  for (uint32_t bit = 0, bits = size_of(type) * 8; bit < bits; ++bit) result |= (value >> bit & 1) << (bits - 1 - bit);
  return result;
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t choice = selector >> 4 * k & 15;
    uint32_t byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    result |= byte << 8 * k;
  }
  return result;
}

uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

uint64_t shift_right(int64_t a, uint64_t count, Type type) {
  const uint64_t bits = size_of(type) * 8;
  if (is_signed(type)) return uint64_t(a >> std::min(count, bits - 1));
  return count >= bits ? 0 : uint64_t(a) >> count;
}

void execute_to_nearest(I& i, Cells cells) {
  const auto word = [&](int k) { return uint32_t(operand(i, cells, k)); };
  const Type type = i.type;
  switch (i.opcode) {
    case Opcode::mov:
      return move(i, cells);
    case Opcode::fma:
      return compute(i, cells, FLOATS(std::fma(a, b, c)), INTEGERS(a));
    case Opcode::add:
      return compute(i, cells, FLOATS(a + b), INTEGERS(int64_t(uint64_t(a) + uint64_t(b))));
    case Opcode::sub:
      return compute(i, cells, FLOATS(a - b), INTEGERS(int64_t(uint64_t(a) - uint64_t(b))));
    case Opcode::mul:
      return compute(i, cells, FLOATS(a * b), INTEGERS(int64_t(uint64_t(a) * uint64_t(b))));
    case Opcode::mad:
      return compute(i, cells, FLOATS(a), INTEGERS(int64_t(uint64_t(a) * uint64_t(b) + uint64_t(c))));
    case Opcode::div:
      return compute(i, cells, FLOATS(a / b), INTEGERS(divide(a, b, type)));
    case Opcode::rem:
      return compute(i, cells, FLOATS(a), INTEGERS(remainder(a, b, type)));
    case Opcode::min:
      return compute(i, cells, FLOATS(minimum(a, b, i.nan_wins)), INTEGERS(clip(less(a, b, type) ? a : b, i.relu)));
    case Opcode::max:
      return compute(i, cells, FLOATS(maximum(a, b, i.nan_wins)), INTEGERS(clip(less(a, b, type) ? b : a, i.relu)));
    case Opcode::neg:
      return compute(i, cells, FLOATS(-a), INTEGERS(int64_t(0 - uint64_t(a))));
    case Opcode::abs:
      return compute(i, cells, FLOATS(std::fabs(a)), INTEGERS(a < 0 ? int64_t(0 - uint64_t(a)) : a));
    case Opcode::copysign:
      return compute(i, cells, FLOATS(std::copysign(b, a)), INTEGERS(a));
    case Opcode::ex2:
      return compute(i, cells, FLOATS(std::exp2(a)), INTEGERS(a));
    case Opcode::lg2:
      return compute(i, cells, FLOATS(std::log2(a)), INTEGERS(a));
    case Opcode::rcp:
      return compute(i, cells, FLOATS(1 / a), INTEGERS(a));
    case Opcode::sqrt:
      return compute(i, cells, FLOATS(std::sqrt(a)), INTEGERS(a));
    case Opcode::rsqrt:
      return compute(i, cells, FLOATS(1 / std::sqrt(a)), INTEGERS(a));
    case Opcode::tanh:
      return compute(i, cells, FLOATS(std::tanh(a)), INTEGERS(a));
    case Opcode::sin:
      return compute(i, cells, FLOATS(std::sin(a)), INTEGERS(a));
    case Opcode::cos:
      return compute(i, cells, FLOATS(std::cos(a)), INTEGERS(a));
    case Opcode::and_:
      return compute(i, cells, FLOATS(a), INTEGERS(a & b));
    case Opcode::or_:
      return compute(i, cells, FLOATS(a), INTEGERS(a | b));
    case Opcode::xor_:
      return compute(i, cells, FLOATS(a), INTEGERS(a ^ b));
    case Opcode::not_:
      return compute(i, cells, FLOATS(a), INTEGERS(~a));
    case Opcode::shl:
      return set(i, cells, word(2) >= size_of(type) * 8 ? 0 : truncated(operand(i, cells, 1) << word(2), type));
    case Opcode::shr:
      return set(i, cells, truncated(shift_right(extended(operand(i, cells, 1), type), word(2), type), type));
    case Opcode::mul_wide:
    case Opcode::mad_wide: {
      const uint64_t product = uint64_t(extended(operand(i, cells, 1), type)) * uint64_t(extended(operand(i, cells, 2), type));
      const uint64_t sum = product + (i.opcode == Opcode::mad_wide ? operand(i, cells, 3) : 0);
      return set(i, cells, size_of(type) == 4 ? sum : uint32_t(sum));
    }
    case Opcode::mul_hi:
    case Opcode::mad_hi: {
      const uint64_t product = high_product(extended(operand(i, cells, 1), type), extended(operand(i, cells, 2), type), type);
      return set(i, cells, truncated(product + (i.opcode == Opcode::mad_hi ? operand(i, cells, 3) : 0), type));
    }
    case Opcode::shf: {  // the funnel: word 2 above word 1
      const uint64_t both = word(1) | uint64_t(word(2)) << 32;
      const uint32_t count = i.variant ? word(3) & 31 : std::min<uint32_t>(word(3), 32);
      return set(i, cells, uint32_t(i.flag ? both << count >> 32 : both >> count));
    }
    case Opcode::bfi:
      return set(i, cells, insert_bits(operand(i, cells, 1), operand(i, cells, 2), word(3) & 255, word(4) & 255, type));
    case Opcode::bfe:
      return set(i, cells, extract_bits(operand(i, cells, 1), word(2) & 255, word(3) & 255, type));
    case Opcode::bfind:
      return set(i, cells, find_leading(operand(i, cells, 1), type, i.flag));
    case Opcode::brev:
      return set(i, cells, reverse_bits(truncated(operand(i, cells, 1), type), type));
    case Opcode::popc:
      return set(i, cells, __builtin_popcountll(truncated(operand(i, cells, 1), type)));
    case Opcode::clz: {
      const uint64_t value = truncated(operand(i, cells, 1), type), bits = size_of(type) * 8;
      return set(i, cells, value ? __builtin_clzll(value) - (64 - bits) : bits);
    }
    case Opcode::prmt:
      return set(i, cells, permute_bytes(word(1), word(2), word(3)));
    case Opcode::lop3:
      return set(i, cells, logic3(word(1), word(2), word(3), word(4)));
    case Opcode::setp:
      return set_predicate(i, cells);
    case Opcode::selp:
      return set(i, cells, truncated(operand(i, cells, predicate(i, cells, 3) ? 1 : 2), type));
    default:
      return convert(i, cells);
  }
}

}  // namespace

void execute_arithmetic(I& i, Cells cells) {
  if (!i.float_rounding) return execute_to_nearest(i, cells);
  std::fesetround(i.float_rounding);
  execute_to_nearest(i, cells);
  std::fesetround(FE_TONEAREST);
}

}  // namespace emulator
