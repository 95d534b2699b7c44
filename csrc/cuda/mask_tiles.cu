// SPDX-License-Identifier: Apache-2.0
// The pre-pass: lists, for each block of rows, which tiles of block_m rows x 64 keys are full or mixed, and packs a bool mask into bits.
//
//   mask_tiles_classify   a bool attn_mask and everything else that masks -> mask_bits, kinds
//   mask_tiles_list       kinds -> lists
//   mask_tiles_keys       key_mask, lengths, causal and window -> lists; their bits are cheaper to evaluate than to load
//   mask_tiles_merge      a PreparedMask's lists of 64 rows -> lists of 128 rows
//
// Full: every row that is present may attend to all 64 keys, which all exist. Empty: none may attend to any of them. Rows past
// query_lengths do not matter: their result does not depend on the keys. mask_arguments.h says which kernels a problem needs.
#include "bool_mask.cuh"
#include "mask_arguments.h"

namespace fused_attention::cuda {

constexpr int kEmpty = 0, kFull = 1, kMixed = 2;

// Writes the list of a line from the kinds of its tiles. The whole warp calls it; kind_of(tile) is the kind of each lane's tile, which may
// be past the last one.
template <class KindOf>
__device__ inline void write_list(int32_t* list, int64_t num_tiles, KindOf kind_of) {
  const int lane = threadIdx.x % 32, end = static_cast<int>(num_tiles);  // at most 2^24
  const uint32_t lanes_below = (1u << lane) - 1;
  int num_full = 0, num_mixed = 0;
  for (int start = 0; start < end; start += 32) {
    const int tile = start + lane;
    const int kind = kind_of(tile);
    const uint32_t full = __ballot_sync(kWholeWarp, tile < end && kind == kFull);
    const uint32_t mixed = __ballot_sync(kWholeWarp, tile < end && kind == kMixed);
    if (full >> lane & 1) list[2 + num_full + __popc(full & lanes_below)] = tile;
    if (mixed >> lane & 1) list[1 + end - num_mixed - __popc(mixed & lanes_below)] = tile;
    num_full += __popc(full);
    num_mixed += __popc(mixed);
  }
  if (lane < 2) list[lane] = lane == 0 ? num_full : num_mixed;
}

// What a line of the lists is about. There are fewer than 2^31 lines and tiles (planner.cpp), which avoids 64-bit divisions: they are
// function calls.
struct Line {
  int batch, head, row_block;

  __device__ Line(const MaskArguments& arguments, uint32_t line) {
    const auto row_blocks = static_cast<uint32_t>(arguments.row_blocks), num_heads = static_cast<uint32_t>(arguments.num_heads);
    const uint32_t map = line / row_blocks;
    row_block = static_cast<int>(line % row_blocks);
    batch = static_cast<int>(map / num_heads);
    head = static_cast<int>(map % num_heads);
  }
};

// Calls write(line) for this warp's lines.
template <class Write>
__device__ inline void for_each_line(const MaskArguments& arguments, Write write) {
  const auto num_lines =
      static_cast<uint32_t>(arguments.batch * arguments.num_heads * (arguments.by_columns ? arguments.key_tiles : arguments.row_blocks));
  const uint32_t warps_per_block = blockDim.x / 32;
  for (uint32_t line = blockIdx.x * warps_per_block + threadIdx.x / 32; line < num_lines; line += gridDim.x * warps_per_block) {
    write(line);
  }
}

}  // namespace fused_attention::cuda

// One tile at a time; each thread packs 32 keys of one row.
extern "C" __global__ void __launch_bounds__(256)
    mask_tiles_classify(const __grid_constant__ fused_attention::cuda::MaskArguments arguments) {
  using namespace fused_attention;
  using namespace fused_attention::cuda;
  const AttentionProblem& problem = arguments.problem;
  const auto key_tiles = static_cast<uint32_t>(arguments.key_tiles);
  const auto num_tiles = static_cast<uint32_t>(arguments.batch * arguments.num_heads * arguments.row_blocks) * key_tiles;
  for (uint32_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const Line line(arguments, tile / key_tiles);
    const int start_n = static_cast<int>(tile % key_tiles) * kKeysPerTile, start_m = line.row_block * arguments.block_m;
    const int64_t batch = line.batch, head = line.head;
    const int thread = threadIdx.x, word = thread >= arguments.block_m;
    const int row = start_m + thread - word * arguments.block_m, first_key = start_n + 32 * word;

    const Sequence sequence(problem, batch);
    const bool present = row < min(int64_t{sequence.rows_present}, arguments.rows);
    uint32_t allowed = existing_keys(problem, batch, sequence.keys_present, first_key);
    allowed = present ? allowed & bits_of(sequence.keys_of(row), first_key) : 0;
    const int64_t offset = batch * problem.attn_mask.batch + head * problem.attn_mask.head + row * problem.attn_mask.row;
    allowed = attn_mask_bits(problem, offset, first_key, allowed);
    if (row < arguments.rows && first_key < problem.seqlen_k) {
      arguments.mask_bits[((batch * arguments.num_heads + head) * arguments.rows + row) * arguments.words + first_key / 32] = allowed;
    }
    const bool all = __syncthreads_and(!present || allowed == kAllKeys), some = __syncthreads_or(allowed != 0);
    if (threadIdx.x == 0) arguments.kinds[tile] = !some ? kEmpty : all ? kFull : kMixed;
  }
}

extern "C" __global__ void __launch_bounds__(256) mask_tiles_list(const __grid_constant__ fused_attention::cuda::MaskArguments arguments) {
  using namespace fused_attention::cuda;
  // A line lists the tiles of keys of a block of rows, or, by columns, the blocks of rows of a tile of keys.
  const bool by_columns = arguments.by_columns;
  const int64_t num_lines = by_columns ? arguments.key_tiles : arguments.row_blocks;  // of one batch element and head, like the next two
  const int64_t num_tiles = by_columns ? arguments.row_blocks : arguments.key_tiles;
  const int64_t line_step = by_columns ? 1 : arguments.key_tiles, tile_step = by_columns ? arguments.key_tiles : 1;
  for_each_line(arguments, [&](int64_t line) {
    const auto map = static_cast<int64_t>(static_cast<uint32_t>(line) / static_cast<uint32_t>(num_lines));
    const uint8_t* kinds = arguments.kinds + map * num_lines * num_tiles + (line - map * num_lines) * line_step;
    write_list(arguments.lists + line * (2 + num_tiles), num_tiles,
               [&](int64_t tile) { return tile < num_tiles ? kinds[tile * tile_step] : kEmpty; });
  });
}

extern "C" __global__ void __launch_bounds__(256) mask_tiles_keys(const __grid_constant__ fused_attention::cuda::MaskArguments arguments) {
  using namespace fused_attention;
  using namespace fused_attention::cuda;
  const AttentionProblem& problem = arguments.problem;
  const int lane = threadIdx.x % 32;
  for_each_line(arguments, [&](int64_t line) {
    const Line place(arguments, static_cast<uint32_t>(line));  // lists of a key_mask are the same for all heads
    const int64_t batch = place.batch;
    const int start_m = place.row_block * arguments.block_m;
    const Sequence sequence(problem, batch);
    const int rows = static_cast<int>(min(int64_t{sequence.rows_present}, arguments.rows));
    const int last_row = min(start_m + arguments.block_m, rows) - 1;
    KeyRange by_first = sequence.keys_of(start_m), by_last = sequence.keys_of(last_row);
    if (last_row < start_m) by_first = by_last = {0, 0};
    const KeyRange by_some = {by_first.from, by_last.to}, by_all = {by_last.from, by_first.to};  // both move right from row to row
    write_list(arguments.lists + line * (2 + arguments.key_tiles), arguments.key_tiles, [&](int64_t tile) {
      const int64_t first_tile = tile - lane;
      int kind = kEmpty;
#pragma unroll 8
      for (int i = 0; i < 32; ++i) {
        const int start_n = static_cast<int>(first_tile + i) * kKeysPerTile;
        if (start_n + kKeysPerTile <= by_some.from || start_n >= by_some.to) continue;
        bool all = true, some = false;
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int first_key = start_n + 32 * word;
          const uint32_t exist = existing_keys(problem, batch, sequence.keys_present, first_key);
          all = all && (exist & bits_of(by_all, first_key)) == kAllKeys;
          some = some || (exist & bits_of(by_some, first_key)) != 0;
        }
        if (i == lane) kind = !some ? kEmpty : all ? kFull : kMixed;
      }
      return kind;
    });
  });
}

extern "C" __global__ void __launch_bounds__(256) mask_tiles_merge(const __grid_constant__ fused_attention::cuda::MaskArguments arguments) {
  using namespace fused_attention;
  using namespace fused_attention::cuda;
  constexpr int kRowsPerList = 64;
  const TileLists& given = arguments.problem.row_tiles;
  for_each_line(arguments, [&](int64_t line) {
    const Line place(arguments, static_cast<uint32_t>(line));
    const int32_t* upper = given.data + place.batch * given.batch + place.head * given.head + 2 * place.row_block * given.line;
    const int32_t* lower = (2 * place.row_block + 1) * kRowsPerList < arguments.rows ? upper + given.line : upper;  // if there are any
    // Full tiles ascend from index 2 on, mixed ones descend to the end.
    const auto kind_in = [&](const int32_t* list, int64_t tile) {
      const auto holds = [&](int num, auto&& tile_at) {
        int begin = 0, end = num;  // the first one >= `tile` is in [begin, end]
        while (begin < end) {
          const int middle = (begin + end) / 2;
          if (tile_at(middle) < tile) {
            begin = middle + 1;
          } else {
            end = middle;
          }
        }
        return begin < num && tile_at(begin) == tile;
      };
      if (holds(list[0], [&](int i) { return list[2 + i]; })) return kFull;
      return holds(list[1], [&](int i) { return list[1 + given.num_tiles - i]; }) ? kMixed : kEmpty;
    };
    write_list(arguments.lists + line * (2 + arguments.key_tiles), arguments.key_tiles, [&](int64_t tile) {
      const int kind = kind_in(upper, tile);
      return kind == kind_in(lower, tile) ? kind : kMixed;
    });
  });
}
