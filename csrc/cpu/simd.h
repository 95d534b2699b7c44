// SPDX-License-Identifier: Apache-2.0
// The vector layer: a float vector `Vec` of kLanes lanes, and the few operations the kernels need.
//
// Include it, directly or through another header here, after `#pragma GCC target(...)`, with FA_ISA naming the instruction set's namespace:
//   FA_AVX512 defined         AVX-512 intrinsics, 16 lanes
//   FA_LANES defined (4, 8)   GNU vector extensions: AVX2 with 8 lanes, SSE2 or NEON with 4 (on NEON, the compiler turns a product with a
//                             broadcast into FMLA by element)
// Do not use std functions below: an inline std function instantiated here would be compiled for this instruction set, and the linker
// could pick that copy for every caller on every machine. So isa_*.cpp include everything from outside this folder before the pragma;
// including it again here does nothing.
#pragma once
#include <cstdint>

#include "../problem.h"

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_MEMBER_INLINE inline __attribute__((always_inline))
#define FA_LAMBDA_INLINE __attribute__((always_inline))
#define FA_NOINLINE static __attribute__((noinline))
#define FA_NOINLINE_MEMBER __attribute__((noinline))

namespace fused_attention::cpu::FA_ISA {

struct bfloat16_t {
  uint16_t bits;
};
struct float16_t {
  uint16_t bits;
};
struct int8_number_t {  // two's complement
  uint8_t bits;
};
struct float8_e4m3_t {  // torch.float8_e4m3fn: no infinity
  uint8_t bits;
};
struct float8_e5m2_t {
  uint8_t bits;
};
// What `load` of 8-bit numbers leaves out, for the caller to put into a factor.
template <class T>
constexpr float kLoadFactor = 1.0f;
template <>
constexpr float kLoadFactor<float8_e4m3_t> = 256.0f;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
constexpr float kLog2eRest = 1.92596303e-8f, kLn2Rest = -1.90465432e-9f;  // the parts lost in rounding them to float32
constexpr float kInfinity = __builtin_inff();
// Scores (in log2 units) above this are scaled before their maximum is subtracted. In a single multiply-add, the bits lost in rounding the
// maximum would end up in the exponents.
constexpr float kScaleFirstAbove = 1 << 20;

#if defined(FA_AVX512) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

FA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FA_INLINE float max_of(float a, float b) { return a > b ? a : b; }
FA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row (b, h, row) of a strided tensor.
template <class T>
FA_INLINE T* row_ptr(const StridedTensor& tensor, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head + row * tensor.row;
}
// The same; null if there is no such tensor.
template <class T>
FA_INLINE T* row_ptr_or_null(const StridedTensor& tensor, int64_t b, int64_t h, int64_t row) {
  return tensor.data ? row_ptr<T>(tensor, b, h, row) : nullptr;
}

// 2^r on [0, 1): minimax polynomials, relative error 7.5e-8 (degree 5), 2.6e-6 (degree 4), 7.5e-5 (degree 3).
constexpr float kExp2OfFraction[3][6] = {{0.999925219f, 0.69583354f, 0.226067155f, 0.0780245226f, 0, 0},
                                         {1.00000259f, 0.693003834f, 0.241442757f, 0.0520114606f, 0.0135341679f, 0},
                                         {0.999999925f, 0.693153073f, 0.240153617f, 0.0558263181f, 0.00898934009f, 0.00187757668f}};
// The same on [-0.5, 0.5].
constexpr float kExp2OfRemainder[3][6] = {{0.999928074f, 0.693260985f, 0.242611122f, 0.0551716691f, 0, 0},
                                          {0.999999261f, 0.693121815f, 0.240247448f, 0.0559178603f, 0.00957010191f, 0},
                                          {1.00000007f, 0.693146967f, 0.240221197f, 0.0555071327f, 0.00967554133f, 0.0013276472f}};

#if defined(FA_AVX512)

constexpr int kLanes = 16;
struct Vec {
  __m512 x;
};
using LaneMask = __mmask16;

FA_INLINE LaneMask first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<LaneMask>((1u << n) - 1); }
// Lanes whose bit is set in 16 consecutive bits; `lane0` is a multiple of kLanes below 16 (always 0 here).
FA_INLINE LaneMask lanes_of_bits(uint16_t bits, int /*lane0*/) { return bits; }
// Lanes whose byte is not 0; the second overload reads `n` bytes, fewer than kLanes.
FA_INLINE LaneMask nonzero_lanes(const uint8_t* bytes) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm_test_epi8_mask(all, all);
}
FA_INLINE LaneMask nonzero_lanes(const uint8_t* bytes, int64_t n) {
  const __m128i present = _mm_maskz_loadu_epi8(first_lanes(n), bytes);
  return _mm_test_epi8_mask(present, present);
}
FA_INLINE Vec select(LaneMask mask, Vec a, Vec b) { return {_mm512_mask_blend_ps(mask, b.x, a.x)}; }
FA_INLINE Vec keep_where(LaneMask mask, Vec a) { return {_mm512_maskz_mov_ps(mask, a.x)}; }
FA_INLINE LaneMask less_than(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ); }

FA_INLINE Vec broadcast(float f) { return {_mm512_set1_ps(f)}; }
FA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FA_INLINE Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
FA_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
FA_INLINE void store_first(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.x); }

FA_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
FA_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.x, b.x, c.x)}; }
FA_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
FA_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
FA_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
FA_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
FA_INLINE Vec max_of(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
FA_INLINE Vec absolute(Vec a) { return {_mm512_abs_ps(a.x)}; }
FA_INLINE Vec lane_indices() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
FA_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.x); }
FA_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.x); }
FA_INLINE void reduce_add4(const Vec v[4], float sums[4]) {
  const __m512 v01 = _mm512_add_ps(_mm512_unpacklo_ps(v[0].x, v[1].x), _mm512_unpackhi_ps(v[0].x, v[1].x));
  const __m512 v23 = _mm512_add_ps(_mm512_unpacklo_ps(v[2].x, v[3].x), _mm512_unpackhi_ps(v[2].x, v[3].x));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23)),
                high = _mm512_unpackhi_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// 2^x for x <= 127; 0 below -126; NaN stays NaN.
// NOTE: scalef takes a microcode assist when its result underflows, as it does for masked scores (-inf), hence the zero mask.
template <int kDegree = 5>
FA_INLINE Vec exp2(Vec x) {
  const float* c = kExp2OfFraction[kDegree - 3];
  const __m512 fraction = _mm512_reduce_ps(x.x, 0x01 | 0x08);  // x - floor(x), no exceptions
  __m512 p = _mm512_set1_ps(c[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(c[i]));
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ), p, x.x)};
}

// x = mantissa * 2^exponent for normal positive x, mantissa in [0.75, 1.5).
FA_INLINE Vec split_exponent(Vec x, Vec& mantissa) {
  mantissa = {_mm512_getmant_ps(x.x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)};
  return {_mm512_getexp_ps(_mm512_div_ps(x.x, mantissa.x))};
}

FA_INLINE __m512 widen(__m256i bits, bfloat16_t) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
FA_INLINE __m512 widen(__m256i bits, float16_t) { return _mm512_cvtph_ps(bits); }
FA_INLINE __m256i narrow(__m512 x, float16_t) { return _mm512_cvtps_ph(x, 0); }
FA_INLINE __m256i narrow(__m512 x, bfloat16_t) {  // round to nearest even
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
}

// 8-bit numbers. The bits of a float8_e4m3 are those of a float16 with a narrower exponent, and 256 times its value; NaN apart.
FA_INLINE __m512 widen(__m128i bytes, int8_number_t) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
FA_INLINE __m512 widen(__m128i bytes, float8_e5m2_t) { return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8)); }
FA_INLINE __m512 widen(__m128i bytes, float8_e4m3_t) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00)));
}

template <class T>
FA_INLINE Vec load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{})};
  else
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{})};
}
template <class T>
FA_INLINE Vec load_first(const T* p, int64_t n) {
  if constexpr (sizeof(T) == 1)
    return {widen(_mm_maskz_loadu_epi8(first_lanes(n), p), T{})};
  else
    return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{})};
}
template <class T>
FA_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a.x, T{}));
}
template <class T>
FA_INLINE void store_first(T* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a.x, T{}));
}

// rows[i] = row i of a 16 x 16 matrix of 32-bit values -> rows[j] = column j.
FA_INLINE void transpose16(__m512i rows[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#else  // GNU vector extensions

constexpr int kLanes = FA_LANES;
typedef float FloatVector __attribute__((vector_size(FA_LANES * 4)));
typedef float UnalignedFloatVector __attribute__((vector_size(FA_LANES * 4), aligned(4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(FA_LANES * 4)));
typedef uint32_t WordVector __attribute__((vector_size(FA_LANES * 4)));
typedef uint8_t ByteVector __attribute__((vector_size(FA_LANES), aligned(1), may_alias));
typedef uint16_t HalfVector __attribute__((vector_size(FA_LANES * 2), aligned(2), may_alias));
struct Vec {
  FloatVector x;
};
using LaneMask = IntVector;  // -1 where set

#if FA_LANES == 8
#define FA_LANE_INDICES {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define FA_LANE_INDICES {0, 1, 2, 3}
#endif
constexpr IntVector kLaneIndex = FA_LANE_INDICES;
#undef FA_LANE_INDICES

FA_INLINE LaneMask first_lanes(int64_t n) { return kLaneIndex < static_cast<int32_t>(min_of(max_of(n, int64_t{0}), int64_t{kLanes})); }
// Lanes whose bit is set, from bit `lane0` on (a multiple of kLanes below 16).
FA_INLINE LaneMask lanes_of_bits(uint16_t bits, int lane0) { return (((bits >> lane0) - IntVector{}) >> kLaneIndex & 1) != 0; }
FA_INLINE LaneMask nonzero_lanes(const uint8_t* bytes) {
  return __builtin_convertvector(*reinterpret_cast<const ByteVector*>(bytes), IntVector) != 0;
}
FA_INLINE LaneMask nonzero_lanes(const uint8_t* bytes, int64_t n) {
  ByteVector present = {};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) present[i] = bytes[i];
  return __builtin_convertvector(present, IntVector) != 0;
}
FA_INLINE Vec select(LaneMask mask, Vec a, Vec b) { return {mask ? a.x : b.x}; }
FA_INLINE Vec keep_where(LaneMask mask, Vec a) { return {(FloatVector)((IntVector)a.x & mask)}; }
FA_INLINE LaneMask less_than(Vec a, Vec b) { return a.x < b.x; }

// `f - zero` is a plain broadcast; `zero + f` would cost an addition, because -0.0 + 0.0 is not -0.0.
FA_INLINE Vec broadcast(float f) { return {f - FloatVector{}}; }
FA_INLINE Vec load(const float* p) { return {*reinterpret_cast<const UnalignedFloatVector*>(p)}; }
FA_INLINE Vec load_first(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  Vec r = broadcast(0.0f);
  for (int i = 0; i < kLanes; ++i)
    if (i < n) r.x[i] = p[i];
  return r;
}
FA_INLINE void store(float* p, Vec a) { *reinterpret_cast<UnalignedFloatVector*>(p) = a.x; }

FA_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }  // contracted to an FMA if the machine has it (GCC's default)
FA_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return {a.x * b.x - c.x}; }
FA_INLINE Vec add(Vec a, Vec b) { return {a.x + b.x}; }
FA_INLINE Vec sub(Vec a, Vec b) { return {a.x - b.x}; }
FA_INLINE Vec mul(Vec a, Vec b) { return {a.x * b.x}; }
FA_INLINE Vec div(Vec a, Vec b) { return {a.x / b.x}; }
FA_INLINE Vec max_of(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }
FA_INLINE Vec absolute(Vec a) { return {(FloatVector)((IntVector)a.x & 0x7fffffff)}; }
FA_INLINE Vec lane_indices() { return {__builtin_convertvector(kLaneIndex, FloatVector)}; }
FA_INLINE float reduce_max(Vec a) {
  float m = a.x[0];
  for (int i = 1; i < kLanes; ++i) m = a.x[i] > m ? a.x[i] : m;
  return m;
}
FA_INLINE float reduce_add(Vec a) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += a.x[i];
  return sum;
}
FA_INLINE void reduce_add4(const Vec v[4], float sums[4]) {
  for (int i = 0; i < 4; ++i) sums[i] = reduce_add(v[i]);
}

// 2^x for x <= 127; 0 below -126; NaN stays NaN.
template <int kDegree = 5>
FA_INLINE Vec exp2(Vec x) {
  const float* c = kExp2OfRemainder[kDegree - 3];
  const IntVector underflow = x.x <= -126.0f;
  const FloatVector clamped = underflow ? broadcast(-126.0f).x : x.x;
  const FloatVector magic = broadcast(12582912.0f).x;  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  const FloatVector shifted = clamped + magic;
  const FloatVector remainder = clamped - (shifted - magic);  // in [-0.5, 0.5]
  FloatVector p = broadcast(c[kDegree]).x;
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = p * remainder + c[i];
  const WordVector scaled = (WordVector)p + ((WordVector)shifted << 23);
  return {(FloatVector)(scaled & ~(WordVector)underflow)};
}

// x = mantissa * 2^exponent for normal positive x, mantissa in [0.75, 1.5).
FA_INLINE Vec split_exponent(Vec x, Vec& mantissa) {
  const IntVector bits = (IntVector)x.x, exponent = (bits - 0x3f400000) >> 23;  // 0x3f400000 is 0.75
  mantissa = {(FloatVector)(bits - (exponent << 23))};
  return {__builtin_convertvector(exponent, FloatVector)};
}

FA_INLINE FloatVector widen(HalfVector bits, bfloat16_t) { return (FloatVector)(__builtin_convertvector(bits, WordVector) << 16); }
FA_INLINE HalfVector narrow(FloatVector x, bfloat16_t) {  // round to nearest even
  const WordVector u = (WordVector)x;
  return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, HalfVector);
}
#if FA_LANES == 8
FA_INLINE FloatVector widen(HalfVector bits, float16_t) { return (FloatVector)_mm256_cvtph_ps((__m128i)bits); }
FA_INLINE HalfVector narrow(FloatVector x, float16_t) { return (HalfVector)_mm256_cvtps_ph((__m256)x, 0); }
#elif defined(__aarch64__)
FA_INLINE FloatVector widen(HalfVector bits, float16_t) { return (FloatVector)vcvt_f32_f16((float16x4_t)bits); }
FA_INLINE HalfVector narrow(FloatVector x, float16_t) { return (HalfVector)vcvt_f16_f32((float32x4_t)x); }
#else
FA_INLINE FloatVector widen(HalfVector bits, float16_t) {
  const WordVector half = __builtin_convertvector(bits, WordVector), magnitude = (half & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const WordVector normal = magnitude + (112u << 23);  // exponent bias 15 -> 127
  const WordVector special = normal + (112u << 23);    // infinity and NaN
  const WordVector subnormal = (WordVector)((FloatVector)(normal + (1u << 23)) - 6.103515625e-05f);
  const WordVector value = exponent == 0x0f800000 ? special : exponent == 0 ? subnormal : normal;
  return (FloatVector)(value | (half & 0x8000) << 16);
}
FA_INLINE HalfVector narrow(FloatVector x, float16_t) {  // round to nearest even
  const WordVector u = (WordVector)x, magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  const WordVector infinity_or_nan = magnitude > 0x7f800000 ? (WordVector)(IntVector{} + 0x7e00) : (WordVector)(IntVector{} + 0x7c00);
  const WordVector subnormal = (WordVector)((FloatVector)magnitude + 0.5f) - 0x3f000000;  // the adder rounds at 2^-24
  const WordVector normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const WordVector value = magnitude >= 0x47800000 ? infinity_or_nan : magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector(value | sign, HalfVector);
}
#endif

// 8-bit numbers, as above.
FA_INLINE FloatVector widen(ByteVector bytes, int8_number_t) {
  return __builtin_convertvector((__builtin_convertvector(bytes, IntVector) ^ 0x80) - 0x80, FloatVector);
}
FA_INLINE FloatVector widen(ByteVector bytes, float8_e5m2_t) { return widen(__builtin_convertvector(bytes, HalfVector) << 8, float16_t{}); }
FA_INLINE FloatVector widen(ByteVector bytes, float8_e4m3_t) {
  const HalfVector word = __builtin_convertvector(bytes, HalfVector), magnitude = word & 0x7f, sign = (word & 0x80) << 8;
  return widen((magnitude == 0x7f ? HalfVector{} + 0x7e00 : magnitude << 7) | sign, float16_t{});
}

ByteVector vector_of(uint8_t);  // declared for their types
HalfVector vector_of(uint16_t);
template <class T>
using VectorOf = decltype(vector_of(T{}.bits));
template <class T>
FA_INLINE Vec load(const T* p) {
  return {widen(*reinterpret_cast<const VectorOf<T>*>(p), T{})};
}
template <class T>
FA_INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  VectorOf<T> bits = {};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) bits[i] = p[i].bits;
  return {widen(bits, T{})};
}
template <class T>
FA_INLINE void store(T* p, Vec a) {
  *reinterpret_cast<HalfVector*>(p) = narrow(a.x, T{});
}
FA_INLINE void store_first(float* p, Vec a, int64_t n) {
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i] = a.x[i];
}
template <class T>
FA_INLINE void store_first(T* p, Vec a, int64_t n) {
  const HalfVector bits = narrow(a.x, T{});
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i].bits = bits[i];
}

// rows[i] = row i of a kLanes x kLanes matrix -> rows[j] = column j.
FA_INLINE void transpose(Vec rows[kLanes]) {
#if FA_LANES == 8
  FloatVector t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i].x, rows[i + 1].x);
    t[i + 1] = _mm256_unpackhi_ps(rows[i].x, rows[i + 1].x);
  }
  FloatVector u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    rows[i + 4].x = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#else
  const IntVector low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const FloatVector low01 = __builtin_shuffle(rows[0].x, rows[1].x, low), high01 = __builtin_shuffle(rows[0].x, rows[1].x, high),
                    low23 = __builtin_shuffle(rows[2].x, rows[3].x, low), high23 = __builtin_shuffle(rows[2].x, rows[3].x, high);
  rows[0].x = __builtin_shuffle(low01, low23, IntVector{0, 1, 4, 5});
  rows[1].x = __builtin_shuffle(low01, low23, IntVector{2, 3, 6, 7});
  rows[2].x = __builtin_shuffle(high01, high23, IntVector{0, 1, 4, 5});
  rows[3].x = __builtin_shuffle(high01, high23, IntVector{2, 3, 6, 7});
#endif
}

#endif

// log2 of a normal positive number, absolute error 1e-7; NaN stays NaN. Uses the series of log2 m = 2 / ln 2 * atanh((m - 1) / (m + 1)).
FA_INLINE Vec log2(Vec x) {
  Vec mantissa;
  const Vec exponent = split_exponent(x, mantissa);
  const Vec t = div(sub(mantissa, broadcast(1.0f)), add(mantissa, broadcast(1.0f))), t2 = mul(t, t);
  Vec series = broadcast(2 * kLog2e / 9);
  for (int term = 7; term > 0; term -= 2) series = fmadd(series, t2, broadcast(2 * kLog2e / static_cast<float>(term)));
  return fmadd(x, broadcast(0.0f), fmadd(t, series, exponent));
}

// tanh, relative error 2e-7: a polynomial near 0 (Cephes), elsewhere 1 - 2 / (e^2x + 1). NaN stays NaN.
FA_INLINE Vec tanh(Vec x) {
  constexpr float kSmall[5] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f};
  const Vec size = absolute(x), x2 = mul(x, x), one = broadcast(1.0f), limit = broadcast(20.0f);
  Vec p = broadcast(kSmall[4]);
  for (int i = 3; i >= 0; --i) p = fmadd(p, x2, broadcast(kSmall[i]));
  const Vec near_zero = fmadd(mul(p, x2), x, x);
  const Vec e = exp2(mul(select(less_than(limit, size), limit, size), broadcast(2 * kLog2e)));
  const Vec large = sub(one, div(broadcast(2.0f), add(e, one)));
  const Vec far = select(less_than(x, broadcast(0.0f)), sub(broadcast(0.0f), large), large);
  return select(less_than(size, broadcast(0.625f)), near_zero, far);
}

}  // namespace fused_attention::cpu::FA_ISA
