// SPDX-License-Identifier: Apache-2.0
// Which tiles of rows a block of keys visits in backward.cuh, in which order, and when its turn comes to add to one.
#pragma once
#include "../mask.cuh"

namespace fused_attention::cuda::sm80 {

struct Visit {
  int start_m;
  bool is_full;  // every score counts, and all keys exist
};

// The tiles of BLOCK_M rows that see some of a block's keys, full and mixed alike, in ascending order.
template <int BLOCK_M, bool HAS_LISTS>
class RowVisits {
 public:
  struct Cursor {  // what has been visited so far
    int visits = 0;
    int full = 0, mixed = 0;  // with lists
  };

  // of_first, of_last: the rows that see the first and the last key by position; both ends move right from key to key. They decide without
  // HAS_LISTS or if `lists` is null. line: in the lists.
  // share: where to start, as a fraction of the tiles; visits wrap around, so that blocks are not all at the same tile.
  FA_DEVICE RowVisits(KeyRange of_first, KeyRange of_last, const TileLists& lists, int batch, int head, int line, float share) {
    if (of_last.to <= 0) return;
    if constexpr (HAS_LISTS) {
      if (lists.data != nullptr) {
        list_ = of_head(lists.data, lists.batch, batch, lists.head, head) + line * lists.line;
        last_place_ = 1 + lists.num_tiles;
        num_full_ = list_[0], num_mixed_ = list_[1];
        num = (num_full_ + num_mixed_) * kParts;
        return;
      }
    }
    full_from_ = static_cast<int>(ptx::again(of_last.from)), full_to_ = static_cast<int>(ptx::again(of_first.to));
    first_ = of_first.from / BLOCK_M;
    num = max((of_last.to + BLOCK_M - 1) / BLOCK_M - first_, 0);
    start_ = min(static_cast<int>(share * static_cast<float>(num)), max(num - 1, 0));
  }

  int num = 0;

  // The next visit, of `num` in all.
  FA_DEVICE Visit next(Cursor& cursor) const {
    if constexpr (HAS_LISTS) {
      if (list_ != nullptr) {
        const int full = cursor.full < num_full_ ? list_[2 + cursor.full] : kNone;                // ascending
        const int mixed = cursor.mixed < num_mixed_ ? list_[last_place_ - cursor.mixed] : kNone;  // ascending from the end
        const int part = cursor.visits++ % kParts;
        const bool is_full = full < mixed;
        if (part == kParts - 1) ++(is_full ? cursor.full : cursor.mixed);
        return {min(full, mixed) * kKeysPerTile + part * BLOCK_M, is_full};
      }
    }
    const int from_start = start_ + cursor.visits++;
    const int tile = first_ + (from_start < num ? from_start : from_start - num);
    const int start_m = tile * BLOCK_M;
    return {start_m, full_from_ <= start_m && start_m + BLOCK_M <= full_to_};
  }

 private:
  static constexpr int kParts = BLOCK_M < kKeysPerTile ? kKeysPerTile / BLOCK_M : 1, kNone = kUnlimited;
  static_assert(!HAS_LISTS || kKeysPerTile % BLOCK_M == 0);

  const int32_t* list_ = nullptr;
  int last_place_ = 0, num_full_ = 0, num_mixed_ = 0;
  int first_ = 0, start_ = 0, full_from_ = 0, full_to_ = 0;
};

// How many blocks of keys visit a tile of rows before the block of keys at start_n does. descending: the last keys come first. tiles: lists
// of the tiles of keys that each 64 rows visit, or null. The whole warp calls it.
template <int BLOCK_M, int BLOCK_N, bool HAS_LISTS>
FA_DEVICE int turn_at(const Sequence& sequence, const TileLists& tiles, int batch, int head, int start_m, int start_n, bool descending) {
  if (HAS_LISTS && tiles.data != nullptr) {
    const int32_t* const list = of_head(tiles.data, tiles.batch, batch, tiles.head, head) + start_m / kKeysPerTile * tiles.line;
    const int num_full = list[0], num_mixed = list[1], lane = threadIdx.x % 32;
    int turn = 0;
#pragma unroll 1
    for (int start = 0; start < num_full + num_mixed; start += 32) {
      const int i = start + lane;
      bool before = false;
      if (i < num_full + num_mixed) {
        const int tile = i < num_full ? list[2 + i] : list[1 + tiles.num_tiles - (i - num_full)];
        before = descending ? tile * kKeysPerTile > start_n : tile * kKeysPerTile < start_n;
      }
      turn += __popc(__ballot_sync(kWholeWarp, before));
    }
    return turn;
  }
  // Visitors are contiguous: the rows that see a block begin and end no earlier than those that see the block before it.
  if (descending) {
    int last = sequence.keys_present - 1;  // of the last key that some row of the tile sees
    if (!sequence.sees_all_to_the_right()) last = min(last, start_m + BLOCK_M - 1 + sequence.offset + sequence.window_right);
    return (last - start_n) / BLOCK_N;
  }
  const int first = sequence.sees_all_to_the_left() ? 0 : max(start_m + sequence.offset - sequence.window_left, 0);
  return (start_n + BLOCK_N - 1 - first) / BLOCK_N;
}

}  // namespace fused_attention::cuda::sm80
