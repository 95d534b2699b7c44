// Bits of floating-point numbers, and rounding to the 16-bit formats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "warp_operations.h"

namespace emulator {

inline float float_of_bits(uint64_t bits) {
  const uint32_t low = uint32_t(bits);
  float value;
  memcpy(&value, &low, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double double_of_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint64_t bits_of_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// To nearest, ties to even; every NaN becomes 0x7fff, as on the GPU.
inline uint32_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t f16_of_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline uint32_t f16_of_double(double value) {  // one rounding, where going through float would be two
  if (std::isnan(value)) return 0x7fff;
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline float float_of_f16(uint32_t low_bits) {
  const uint16_t bits = uint16_t(low_bits);
  _Float16 half;
  memcpy(&half, &bits, sizeof half);
  return float(half);
}
inline float float_of_bf16(uint32_t low_bits) { return float_of_bits(low_bits << 16); }
inline float to_float(uint32_t low_bits, Float16 type) { return type == Float16::bf16 ? float_of_bf16(low_bits) : float_of_f16(low_bits); }

// Subnormal numbers become zero (.ftz).
inline float flush(float value) { return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value; }

}  // namespace emulator
