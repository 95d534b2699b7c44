// SPDX-License-Identifier: Apache-2.0
// AMX tiles, the dot product of bfloat16 pairs and the conversion to bfloat16 in AVX-512, so that machines without AMX or AVX512-BF16 can
// test their kernels. Compiled in by `g++ -include tests/emulated_bf16.h csrc/cpu/isa_amx.cpp`: the names of the instructions become
// functions.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#define FA_EMULATED static inline __attribute__((target("avx512f,avx512bw")))

namespace emulated_bf16 {

struct Tile {
  alignas(64) uint32_t row[16][16];
};
static thread_local Tile tiles[8];

FA_EMULATED void load(int tile, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[tile].row[r], static_cast<const char*>(base) + r * stride, 64);
}

FA_EMULATED void store(int tile, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tiles[tile].row[r], 64);
}

FA_EMULATED void zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }

// sum += a * b, the low halves of 32 bits, then the high ones.
FA_EMULATED __m512 dot_product(__m512 sum, __m512i a, __m512i b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
}

// c += a * b, pairs of bfloat16 along the depth.
FA_EMULATED void multiply(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    __m512 sum = _mm512_load_ps(tiles[c].row[m]);
    for (int k = 0; k < 16; ++k)
      sum = dot_product(sum, _mm512_set1_epi32(static_cast<int>(tiles[a].row[m][k])), _mm512_load_si512(tiles[b].row[k]));
    _mm512_store_ps(tiles[c].row[m], sum);
  }
}

// Rounded to nearest even; NaN stays NaN.
FA_EMULATED __m256i narrow(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}

FA_EMULATED __m512bh narrow_two(__m512 upper, __m512 lower) {
  return reinterpret_cast<__m512bh>(_mm512_inserti64x4(_mm512_castsi256_si512(narrow(lower)), narrow(upper), 1));
}

}  // namespace emulated_bf16

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, base, stride) emulated_bf16::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_bf16::store(tile, base, stride)
#define _tile_zero(tile) emulated_bf16::zero(tile)
#define _tile_dpbf16ps(c, a, b) emulated_bf16::multiply(c, a, b)
#define _tile_loadconfig(configuration) static_cast<void>(configuration)
#define _tile_release() static_cast<void>(0)
#define _mm512_dpbf16_ps(sum, a, b) emulated_bf16::dot_product(sum, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))
#define _mm512_cvtne2ps_pbh(upper, lower) emulated_bf16::narrow_two(upper, lower)

// What amx_available() and avx512_bf16_available() ask.
#define __builtin_cpu_supports(feature) true
#define syscall(...) 0
