// SPDX-License-Identifier: Apache-2.0
// Products of bf16 tiles on AMX.
#pragma once
#include "bf16_tiles.h"
#include "mask.h"

namespace fused_attention::cpu::FA_ISA {

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "LDTILECFG reads 64 bytes");
static const TileConfiguration kFullTiles;

// Products of tiles by TDPBF16PS. The tiles are configured for the lifetime of the object, then released, so that context switches stay
// cheap.
class AmxTiles {
 public:
  AmxTiles() {
    publish_stores();
    _tile_loadconfig(&kFullTiles);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  static constexpr bool kAnySize = true;
  static bool pay(const AttentionProblem&) { return true; }
  static bool pay(const AttentionProblem&, const SequenceBounds&) { return true; }

  // One block of C: kRowTiles x kColumnTiles tiles, each 1 or 2. C tiles are registers 0-3, A 4-5, B 6-7.
  template <int kRowTiles, int kColumnTiles, int kProducts>
  static FA_MEMBER_INLINE void matmul_block(int64_t depth, Parts a, int64_t a_stride, const TileGrid& b, int64_t column, float* c,
                                            int64_t c_stride, bool accumulate) {
    const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kColumnTiles == 2) _tile_loadd(1, c + 16, c_bytes);
      if constexpr (kRowTiles == 2) _tile_loadd(2, c + 16 * c_stride, c_bytes);
      if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (kColumnTiles == 2) _tile_zero(1);
      if constexpr (kRowTiles == 2) _tile_zero(2);
      if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_zero(3);
    }
    for (int product = 0; product < kProducts; ++product) {
      const auto [of_a, of_b] = kPartProducts[product];
      const Bf16Bits* a_tiles = a.at(of_a);
      for (int64_t k = 0; k < depth / 32; ++k) {
        _tile_loadd(4, a_tiles + k * 32, a_bytes);
        _tile_loadd(6, b.at(column, k, of_b), 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kColumnTiles == 2) {
          _tile_loadd(7, b.at(column + 1, k, of_b), 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kRowTiles == 2) {
          _tile_loadd(5, a_tiles + 16 * a_stride + k * 32, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (kColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kColumnTiles == 2) _tile_stored(1, c + 16, c_bytes);
    if constexpr (kRowTiles == 2) _tile_stored(2, c + 16 * c_stride, c_bytes);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
  }
};

}  // namespace fused_attention::cpu::FA_ISA
