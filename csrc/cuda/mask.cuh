// SPDX-License-Identifier: Apache-2.0
// Which rows and keys of a sequence exist, which keys a row may attend to, and which blocks of keys a block of rows visits.
#pragma once
#include <type_traits>

#include "forward_arguments.h"
#include "softmax.cuh"

namespace fused_attention::cuda {

constexpr uint32_t kAllKeys = 0xffffffff;
constexpr float kMaskedBelow = -1e30f;  // a float mask value below this masks

struct KeyRange {
  int from, to;  // [from, to), empty where to <= from
};

// Bit b: whether key first_key + b is in the range.
FA_DEVICE uint32_t bits_of(KeyRange range, int first_key) {
  const auto bits_below = [&](int key) {
    const int count = min(max(key - first_key, 0), 32);
    return count == 32 ? kAllKeys : (1u << count) - 1;
  };
  return bits_below(range.to) & ~bits_below(range.from);
}

// One sequence: `rows` rows in memory, of which `rows_present` are present, and `keys_present` keys. Sequence lengths plus the diagonal's
// offset are at most 2^30, and so is a window side that limits anything: their sums fit in an int.
struct Sequence {
  int64_t first_row = 0, first_key = 0;  // in memory, of packed sequences
  int rows, rows_present, keys_present, offset, window_left, window_right;

  // For problems without packed sequences and lengths: every sequence is the same.
  FA_DEVICE explicit Sequence(const AttentionProblem& problem)
      : rows(static_cast<int>(problem.seqlen_q)),
        rows_present(rows),
        keys_present(static_cast<int>(problem.seqlen_k)),
        offset(problem.diagonal + (problem.bottom_right ? keys_present - rows : 0)),
        window_left(problem.window_left),
        window_right(problem.window_right) {}

  FA_DEVICE Sequence(const AttentionProblem& problem, int64_t batch)
      : rows(static_cast<int>(problem.seqlen_q)),
        keys_present(static_cast<int>(problem.seqlen_k)),
        offset(problem.diagonal),
        window_left(problem.window_left),
        window_right(problem.window_right) {
    if (problem.cu_seqlens_q != nullptr) {  // clamped, so that no value leads out of bounds
      first_row = clamped(problem.cu_seqlens_q[batch], problem.num_tokens_q);
      first_key = clamped(problem.cu_seqlens_k[batch], problem.num_tokens_k);
      rows = clamped(clamped(problem.cu_seqlens_q[batch + 1], problem.num_tokens_q) - first_row, rows);
      keys_present = clamped(clamped(problem.cu_seqlens_k[batch + 1], problem.num_tokens_k) - first_key, keys_present);
    }
    rows_present = problem.query_lengths == nullptr ? rows : clamped(problem.query_lengths[batch], rows);
    if (problem.key_lengths != nullptr) keys_present = clamped(problem.key_lengths[batch], keys_present);
    if (problem.bottom_right) offset += keys_present - rows_present;
  }

  FA_DEVICE bool sees_all_to_the_left() const { return window_left >= kUnlimited; }
  FA_DEVICE bool sees_all_to_the_right() const { return window_right >= kUnlimited; }

  // By position alone.
  FA_DEVICE KeyRange keys_of(int row) const {
    return {sees_all_to_the_left() ? 0 : max(row + offset - window_left, 0),
            sees_all_to_the_right() ? keys_present : min(row + offset + window_right + 1, keys_present)};
  }
  FA_DEVICE KeyRange rows_of(int key) const {  // that may attend to it
    return {sees_all_to_the_right() ? 0 : max(key - offset - window_right, 0),
            sees_all_to_the_left() ? rows_present : min(key - offset + window_left + 1, rows_present)};
  }

 private:
  static FA_DEVICE int clamped(int64_t number, int64_t most) { return static_cast<int>(min(max(number, int64_t{0}), most)); }
};

// Bit b: whether key first_key + b exists, of a batch element. A whole warp calls it.
FA_DEVICE uint32_t existing_keys(const AttentionProblem& problem, int64_t batch, int keys_present, int first_key) {
  if (problem.key_mask == nullptr) return bits_of({0, keys_present}, first_key);
  const int key = first_key + static_cast<int>(threadIdx.x % 32);
  return __ballot_sync(kWholeWarp,
                       key < keys_present && problem.key_mask[batch * problem.key_mask_batch + key * problem.key_mask_key] != 0);
}

template <class T>
FA_DEVICE const T* of_head(const T* data, int64_t batch_stride, int64_t batch, int64_t head_stride, int64_t head) {
  return data == nullptr ? nullptr : data + batch * batch_stride + head * head_stride;
}

// The blocks of BLOCK keys that some rows visit: first those in which every score counts, then the mixed ones. Or, with rows and keys
// swapped, the blocks of rows that visit some keys: the code is the same.
template <int BLOCK, bool HAS_LISTS>
class VisitedBlocks {
 public:
  // of_first, of_last: what the first and the last row may attend to by position; both ends move right from row to row. They decide
  // without HAS_LISTS or if `lists` is null. line: in the lists. is_absent: the visitor does not exist, and visits nothing.
  FA_DEVICE VisitedBlocks(KeyRange of_first, KeyRange of_last, bool is_absent, const TileLists& lists, int batch, int head, int line)
      : lists_(lists), batch_(batch), head_(head), line_(line) {
    if (is_absent) return;
    if (HAS_LISTS && lists.data != nullptr) {
      const int32_t* const tiles = list();
      num_full = tiles[0] * kBlocksPerTile;
      num_blocks = num_full + tiles[1] * kBlocksPerTile;
      return;
    }
    first_ = of_first.from / BLOCK;
    const int end = max((max(of_last.to, 0) + BLOCK - 1) / BLOCK, first_);
    first_full_ = min((of_last.from + BLOCK - 1) / BLOCK, end);
    num_full = min(max(max(of_first.to, 0) / BLOCK, first_full_), end) - first_full_;
    num_blocks = end - first_;
  }

  int num_full = 0, num_blocks = 0;

  // Where the block of a step starts; step < num_blocks.
  FA_DEVICE int start(int step) const {
    if (HAS_LISTS && lists_.data != nullptr) {
      const int place = step < num_full ? step / kBlocksPerTile : lists_.num_tiles - 1 - (step - num_full) / kBlocksPerTile;
      return list()[2 + place] * kKeysPerTile + step % kBlocksPerTile * BLOCK;
    }
    if (step < num_full) return (first_full_ + step) * BLOCK;
    const int block = first_ + step - num_full;  // there are mixed blocks on both sides of the full ones
    return (block < first_full_ ? block : block + num_full) * BLOCK;
  }

  // step_over(step, masked): without masks where every score counts, then with them, in two loops.
  template <class StepOver>
  FA_DEVICE void for_each(const StepOver& step_over) const {
    int step = 0;
#pragma unroll 1
    for (; step < num_full; ++step) step_over(step, std::false_type());
#pragma unroll 1
    for (; step < num_blocks; ++step) step_over(step, std::true_type());
  }

 private:
  static constexpr int kBlocksPerTile = kKeysPerTile / BLOCK;

  FA_DEVICE const int32_t* list() const { return of_head(lists_.data, lists_.batch, batch_, lists_.head, head_) + line_ * lists_.line; }

  const TileLists& lists_;
  int batch_, head_, line_, first_ = 0, first_full_ = 0;
};

// The blocks of BLOCK_N keys that a block of BLOCK_M rows visits.
template <int BLOCK_M, int BLOCK_N, bool HAS_LISTS>
FA_DEVICE VisitedBlocks<BLOCK_N, HAS_LISTS> key_blocks(const Sequence& sequence, const TileLists& lists, int batch, int head, int start_m) {
  const int last_row = min(start_m + BLOCK_M, sequence.rows_present) - 1;
  return {sequence.keys_of(start_m), sequence.keys_of(last_row), last_row < start_m, lists, batch, head, start_m / BLOCK_M};
}

// Masks the scores of one head within a block of keys: by position, and by bits or a key_mask.
struct ScoreMask {
  const Sequence& sequence;
  const AttentionProblem& problem;
  int batch, head;

  // Whether a row of key and value may be read and counts. Never asked in full blocks, where all keys exist.
  FA_DEVICE bool key_exists(int key) const {
    return key < sequence.keys_present &&
           (problem.key_mask == nullptr || problem.key_mask[batch * problem.key_mask_batch + key * problem.key_mask_key] != 0);
  }

  // Sets a warp's masked scores to -inf. BY_POSITION: there are neither bits nor a key_mask.
  //   row_of(m, half): the row in the sequence of this lane's row lane / 4, or 8 below, of matrix m
  template <bool BY_POSITION, int MATRICES, int BLOCKS, class RowOf>
  FA_DEVICE void apply(Accumulators<MATRICES, BLOCKS>& scores, RowOf row_of, int start_n) const {
    constexpr int kWords = (BLOCKS + 3) / 4, kBlocksPerWord = BLOCKS / kWords;
    const int lane = threadIdx.x % 32;
    // From row 0 of the head. For rows that are present, the bits are the whole mask.
    const uint32_t* const bits = of_head(problem.mask_bits.data, problem.mask_bits.batch, batch, problem.mask_bits.head, head);
    uint32_t existing[kWords];
    if constexpr (!BY_POSITION) {
      if (bits == nullptr) {
#pragma unroll
        for (int word = 0; word < kWords; ++word)
          existing[word] = existing_keys(problem, batch, sequence.keys_present, start_n + 32 * word);
      }
    }
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const KeyRange range = sequence.keys_of(row);
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          const int first_key = start_n + 32 * word;
          uint32_t allowed;
          if (BY_POSITION || bits == nullptr) {
            allowed = bits_of(range, first_key);
            if constexpr (!BY_POSITION) allowed &= existing[word];
          } else {
            const bool readable = row < sequence.rows_present && first_key < problem.seqlen_k;
            allowed = readable ? bits[row * problem.mask_bits.line + first_key / 32] : 0;
          }
          allowed >>= 2 * (lane % 4);  // bits 8 n and 8 n + 1 are now those of this lane's elements of block n
#pragma unroll
          for (int n = 0; n < kBlocksPerWord; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& score = scores[m][4 * word + n][2 * half + e];
              if ((allowed >> (8 * n + e) & 1) == 0) score = -kInfinity;
            }
          }
        }
      }
    }
  }
};

}  // namespace fused_attention::cuda
