// SPDX-License-Identifier: Apache-2.0
// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the dropout generator,
// the same function in every backend. One draw of 4 words covers 2 queries x 4 keys, {i, i + 8} x {j, j + 1, j + 8, j + 9}:
//
//   counter = ((j / 16) * 4 + (j % 8) / 2, (i / 16) * 8 + i % 8, batch * num_heads + head, offset mod 2^32)
//   key     = (seed mod 2^32, (seed >> 32) xor (offset >> 32))
//   lane    = ((i / 8) % 2) * 4 + ((j / 8) % 2) * 2 + j % 2;  number = low (even lane) or high (odd lane) half of word lane / 2
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fused_attention {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t key0, key1, offset;  // offset is the counter's fourth word

  static FA_HOST_DEVICE PhiloxKey from_rng_state(const int64_t* rng_state) {
    const uint64_t seed = static_cast<uint64_t>(rng_state[0]), offset = static_cast<uint64_t>(rng_state[1]);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(offset >> 32),
            static_cast<uint32_t>(offset)};
  }
};

// words: counter in, 4 random words out.
FA_HOST_DEVICE void philox4x32(uint32_t words[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * words[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * words[2];
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ words[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ words[3] ^ key1;
    words[1] = static_cast<uint32_t>(product1);
    words[3] = static_cast<uint32_t>(product0);
    words[0] = next0;
    words[2] = next2;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace fused_attention
