// SPDX-License-Identifier: Apache-2.0
// What the kernels of bf16 tiles read and write: bfloat16 numbers, or float32 numbers split into two parts of bfloat16, x = high + low with
// high = bf16(x) and low = bf16(x - high), which leaves out at most 2^-17 of x. A product of two such numbers is high * high + high * low +
// low * high, summed in float32; low * low, at most 2^-16 of it, is left out. (Henry, Tang and Heinecke 2019.)
// NOTE: an infinity has a low part of 0, so products with it are NaN.
#pragma once
#include "matmul.h"
#include "online_softmax.h"

namespace fused_attention::cpu::FA_ISA {

using Bf16Bits = uint16_t;

FA_INLINE __mmask32 first_lanes32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }

// 32 numbers, their first 16 in `first`, as bfloat16.
FA_INLINE __m512i narrow(__m512 first, __m512 second) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)); }

// What that took from them, as bfloat16; 0 where `narrowed` is not finite.
FA_INLINE __m512i narrowing_error(__m512 first, __m512 second, __m512i narrowed) {
  const Vec lost_first = rounding_error({first}, {widen(_mm512_castsi512_si256(narrowed), bfloat16_t{})}),
            lost_second = rounding_error({second}, {widen(_mm512_extracti64x4_epi64(narrowed, 1), bfloat16_t{})});
  return narrow(lost_first.x, lost_second.x);
}

struct Bf16Storage {
  using Element = Bf16Bits;
  using Number = bfloat16_t;  // what the float32 kernels call it
  static constexpr Dtype kDtype = Dtype::bfloat16;
  static constexpr int kParts = 1;

  static FA_MEMBER_INLINE __m512i load(const Element* from, __mmask32 lanes, int /* part */) {
    return _mm512_maskz_loadu_epi16(lanes, from);
  }
  static FA_MEMBER_INLINE void store(Element* to, __mmask32 lanes, __m512 first, __m512 second) {
    _mm512_mask_storeu_epi16(to, lanes, narrow(first, second));
  }
  // sum + left * right, 32 products into 16 sums.
  static FA_MEMBER_INLINE __m512 add_products(const Element* left, const Element* right, __mmask32 lanes, __m512 sum) {
    const __m512i a = load(left, lanes, 0), b = load(right, lanes, 0), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
  }
};

struct SplitStorage {
  using Element = float;
  using Number = float;
  static constexpr Dtype kDtype = Dtype::float32;
  static constexpr int kParts = 2;

  static FA_MEMBER_INLINE __m512i load(const Element* from, __mmask32 lanes, int part) {
    const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
                 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16);
    const __m512i high = narrow(first, second);
    return part == 0 ? high : narrowing_error(first, second, high);
  }
  static FA_MEMBER_INLINE void store(Element* to, __mmask32 lanes, __m512 first, __m512 second) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), first);
    _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes >> 16), second);
  }
  static FA_MEMBER_INLINE __m512 add_products(const Element* left, const Element* right, __mmask32 lanes, __m512 sum) {
    for (int i = 0; i < 32; i += 16, lanes >>= 16)
      sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), left + i),
                            _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), right + i), sum);
    return sum;
  }
};

// An operand of a product in scratch memory; `low` elements after each bfloat16 number is its low part, if there are two parts.
struct Parts {
  Bf16Bits* high = nullptr;
  int64_t low = 0;

  Bf16Bits* at(int part) const { return high + part * low; }
  Parts operator+(int64_t elements) const { return {high + elements, low}; }
};

// count: a multiple of 32.
template <class Storage>
Parts take_parts(Arena& arena, int64_t count) {
  return {arena.take<Bf16Bits>(Storage::kParts * count), count};
}

template <class Element>
FA_INLINE void store_zero_row(Element* row, int64_t head_dim) {
  __builtin_memset(row, 0, static_cast<size_t>(head_dim) * sizeof(Element));
}

}  // namespace fused_attention::cpu::FA_ISA
