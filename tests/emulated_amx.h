// SPDX-License-Identifier: Apache-2.0
// AMX tiles and the bfloat16 conversion in AVX-512, so that machines without AMX can test the AMX kernels. Compiled in by
// `g++ -include tests/emulated_amx.h csrc/cpu/isa_amx.cpp`: the names of the instructions become functions.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#define FA_EMULATED static inline __attribute__((target("avx512f,avx512bw")))

namespace emulated_amx {

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

// c += a * b, pairs of bfloat16 along the depth.
FA_EMULATED void multiply(int c, int a, int b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < 16; ++m) {
    __m512 sum = _mm512_load_ps(tiles[c].row[m]);
    for (int k = 0; k < 16; ++k) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(tiles[a].row[m][k])), column = _mm512_load_si512(tiles[b].row[k]);
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(column, 16)), sum);
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, high)), _mm512_castsi512_ps(_mm512_and_si512(column, high)), sum);
    }
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

}  // namespace emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_dpbf16ps(c, a, b) emulated_amx::multiply(c, a, b)
#define _tile_loadconfig(configuration) static_cast<void>(configuration)
#define _tile_release() static_cast<void>(0)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated_amx::narrow_two(upper, lower)

// What amx_available() asks.
#define __builtin_cpu_supports(feature) true
#define syscall(...) 0
