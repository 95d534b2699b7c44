// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

#include "single_tile_layout.h"

namespace fused_attention::cuda {
namespace sm80 {
namespace {

constexpr int kMaxDecodeRows = 64;       // query rows to a key head, all query heads together
constexpr int kMaxSplits = 128;          // of the keys of a decoding call
constexpr int kKeysPerSplit = 256;       // at least, so that combining costs little
constexpr int kMaxSingleTileKeys = 128;  // of a head, which the single-tile kernels keep in shared memory
constexpr int kMaxSingleTileRows = 512;  // rows of a head; in the backward of all query heads of a key head
constexpr int kMaxRowTilesInFlight = 4;
constexpr int kSingleTileBlockWarps = 4;  // of a block of several problems
constexpr int kBlocksPerProcessor = 2;    // that keep enough loads in flight

// How many tensor-core operations take as long as adding a byte of float32 to memory: the backward in one pass has fewer of the former and
// more of the latter. 600 T/s by 2.4 TB/s on an H200, of which the latter is a guess (docs/cuda-kernels.md).
constexpr int kOperationsPerAddedByte = 256;

std::atomic<bool> use_single_tile_kernels{true};

const Image* find_image(const Planner& planner, Pass pass, const AttentionProblem& problem, bool required) {
  const FeatureClass wanted = feature_class(problem);
  const bool is_single_tile = pass == Pass::single_tile_forward || pass == Pass::single_tile_backward;
  if (pass == Pass::decode) return planner.find(pass, FeatureClass::masked, problem, required);
  return planner.find(pass, is_single_tile && wanted == FeatureClass::plain ? FeatureClass::masked : wanted, problem, required);
}

// Enough blocks to keep every multiprocessor busy; from sizes only, never from lengths, which are on the device.
int num_splits(const AttentionProblem& problem, const DeviceLimits& limits, int64_t unsplit_blocks) {
  const int64_t visible = std::min(problem.seqlen_k, problem.seqlen_q + problem.window_left + problem.window_right);
  const int64_t wanted = ceil_div(static_cast<int64_t>(kBlocksPerProcessor) * limits.multiprocessors, unsplit_blocks);
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, int64_t{kMaxSplits}, ceil_div(visible, kKeysPerSplit)})));
}

// The decoding kernel for this call, or null: it takes few rows, with masks that depend on nothing but their position.
const Image* decode_image(const Planner& planner, const AttentionProblem& problem) {
  const int64_t rows = problem.num_heads / problem.num_heads_kv * problem.seqlen_q;
  const bool masks = problem.attn_mask.data != nullptr || problem.row_tiles.data != nullptr || problem.query_lengths != nullptr;
  if (rows > kMaxDecodeRows || masks || problem.cu_seqlens_q != nullptr || problem.dropout_threshold != 0) return nullptr;
  const Image* image = find_image(planner, Pass::decode, problem, false);
  // Several blocks of rows read the same keys: only worth it on multiprocessors that the forward kernel would leave idle.
  const bool idle = problem.batch * problem.num_heads < planner.limits.multiprocessors;
  return image != nullptr && (rows <= image->block_m || idle) ? image : nullptr;
}

void plan_decode(Planner& planner, const Image& image, ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  const int64_t lines = problem.batch * problem.num_heads * problem.seqlen_q;
  const int64_t row_blocks = ceil_div(arguments.heads_per_group * problem.seqlen_q, image.block_m);
  const int64_t unsplit_blocks = problem.batch * problem.num_heads_kv * row_blocks;
  const int splits = num_splits(problem, planner.limits, unsplit_blocks);
  arguments.num_splits = splits;
  if (splits > 1) {
    arguments.partial_out = planner.take<float>(splits * lines * problem.head_dim_v * sizeof(float));
    arguments.partial_lse = planner.take<float>(splits * lines * sizeof(float));
  }
  planner.launch(image, unsplit_blocks * splits, arguments);
  if (splits > 1) {
    const Image& combine = planner.named(problem.dtype == Dtype::bfloat16 ? "combine_bf16" : "combine_fp16");
    planner.launch(combine, ceil_div(lines, combine.block_m), arguments);
  }
}

// The single-tile kernel for this call, or null: all keys of a head must fit in shared memory. With many rows, the other forward kernel
// reads the keys for more rows per warp.
const Image* single_tile_image(const Planner& planner, Pass pass, const AttentionProblem& problem) {
  if (!use_single_tile_kernels || problem.seqlen_k > kMaxSingleTileKeys) return nullptr;
  if (pass == Pass::single_tile_forward && problem.seqlen_q > kMaxSingleTileRows) return nullptr;
  const Image* image = find_image(planner, pass, problem, false);
  const int64_t rows = problem.num_heads / problem.num_heads_kv * ceil_div(problem.seqlen_q, kRowsPerWarp);
  const bool countable = problem.batch * problem.num_heads_kv * rows <= std::numeric_limits<int32_t>::max();
  return image != nullptr && countable ? image : nullptr;
}

// A block takes as many units as there is room for, unless that leaves a multiprocessor without a block.
template <class Arguments>
void launch_single_tile(Planner& planner, const Image& image, int most_warps, const Arguments& arguments) {
  const SingleTileUnits& units = arguments.units;
  const int64_t room = std::min<int64_t>(most_warps / units.warps, image.shared_bytes / units.shared_bytes);
  const int64_t groups = std::max<int64_t>(1, std::min<int64_t>(room, units.count / std::max(planner.limits.multiprocessors, 1)));
  planner.launch(image, ceil_div(units.count, groups), static_cast<int>(32 * units.warps * groups),
                 static_cast<int>(units.shared_bytes * groups), arguments);
}

void plan_single_tile_forward(Planner& planner, const Image& image, ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  SingleTileUnits& units = arguments.units;
  const int most_warps = image.num_threads / 32;
  const int64_t pieces = arguments.heads_per_group * ceil_div(problem.seqlen_q, kRowsPerWarp);
  const int64_t per_key_head = ceil_div(pieces, most_warps), warps = ceil_div(pieces, per_key_head);
  const int64_t keys = ceil_div(problem.seqlen_k, kKeysPerWord) * kKeysPerWord;
  units.per_key_head = static_cast<int32_t>(per_key_head);
  units.warps = static_cast<int32_t>(warps);
  units.count = static_cast<uint32_t>(problem.batch * problem.num_heads_kv * per_key_head);
  units.shared_bytes = SingleTileForwardLayout(image.head_dim_qk, image.head_dim_v, units.warps, static_cast<int>(keys)).bytes;
  launch_single_tile(planner, image, most_warps, arguments);
}

// The single-tile kernel that computes every gradient of this call, or null. A group of warps takes all rows of a key head: not
// if there are many and too few key heads to keep the multiprocessors busy. It stores the gradient of a mask with an element per score, and
// sums that of a mask of one row.
const Image* single_tile_backward_image(const Planner& planner, const AttentionProblem& problem, const SideGradients& side) {
  if (side.kernels != BackwardKernels::chosen) return nullptr;
  const int64_t units = problem.batch * problem.num_heads_kv, rows = problem.num_heads / problem.num_heads_kv * problem.seqlen_q;
  if (rows > kMaxSingleTileRows && units < planner.limits.multiprocessors) return nullptr;
  const StridedTensor& mask = side.dattn_mask;
  const bool shared = (problem.batch > 1 && mask.batch == 0) || (problem.num_heads > 1 && mask.head == 0);
  if (side.row_sums != nullptr || (mask.data != nullptr && shared)) return nullptr;
  return single_tile_image(planner, Pass::single_tile_backward, problem);
}

void plan_single_tile_backward(Planner& planner, const Image& image, BackwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  SingleTileUnits& units = arguments.units;
  units.warps = static_cast<int32_t>(ceil_div(problem.seqlen_k, kRowsPerWarp));
  units.count = static_cast<uint32_t>(problem.batch * problem.num_heads_kv);
  const auto layout = [&](int row_tiles) {
    return SingleTileBackwardLayout(image.head_dim_qk, image.head_dim_v, image.block_m, units.warps, row_tiles);
  };
  const int64_t tiles = arguments.heads_per_group * ceil_div(problem.seqlen_q, image.block_m);
  const int64_t room = (image.shared_bytes - layout(0).bytes) / layout(0).row_tile;
  units.row_tiles_in_flight = static_cast<int32_t>(std::min({tiles, int64_t{kMaxRowTilesInFlight}, room}));
  units.shared_bytes = layout(units.row_tiles_in_flight).bytes;
  launch_single_tile(planner, image, std::max<int>(kSingleTileBlockWarps, units.warps), arguments);
}

void plan_forward(Planner& planner, const AttentionProblem& problem) {
  ForwardArguments arguments;
  fill(arguments, problem);
  const Image *const decode = decode_image(planner, problem), *const whole = single_tile_image(planner, Pass::single_tile_forward, problem);
  if (decode != nullptr && (whole == nullptr || arguments.heads_per_group * problem.seqlen_q <= decode->block_m)) {
    plan_decode(planner, *decode, arguments);
  } else if (whole != nullptr) {
    plan_single_tile_forward(planner, *whole, arguments);
  } else {
    const Image& image = *find_image(planner, Pass::forward, problem, true);
    planner.plan_mask_tiles(image.block_m, arguments);
    planner.launch(image, problem.batch * problem.num_heads * ceil_div(problem.seqlen_q, image.block_m), arguments);
  }
}

// The two-pass kernel that computes dkey and dvalue together, or null if separate ones fit the head dims better.
const Image* both_keys_image(const Planner& planner, const AttentionProblem& problem) {
  const Image* const both = find_image(planner, Pass::backward_key, problem, false);
  const Image* const dkey = find_image(planner, Pass::backward_dkey, problem, both == nullptr);
  if (both == nullptr || dkey == nullptr) return both;
  return both->head_dim_qk + both->head_dim_v <= dkey->head_dim_qk + dkey->head_dim_v ? both : nullptr;
}

// The kernel that computes the gradients in one pass if that is wanted, or null.
const Image* one_pass_image(const Planner& planner, const AttentionProblem& problem, const SideGradients& side) {
  if (side.kernels == BackwardKernels::two_passes) return nullptr;
  const bool asked_for = side.kernels == BackwardKernels::one_pass;
  // Sums over keys would have another order in every run.
  const bool sums_over_keys = side.row_sums != nullptr || side.slope_sums != nullptr;
  const bool bias = feature_class(problem) == FeatureClass::bias;
  const Image* const image = sums_over_keys || bias ? nullptr : find_image(planner, Pass::backward, problem, asked_for);
  if (asked_for && image == nullptr)
    throw std::invalid_argument("the backward in one pass takes no float attn_mask and no slopes' gradients");
  if (asked_for || image == nullptr) return image;
  // Two passes compute two more products, or three if dkey and dvalue have a kernel each. One pass adds a float32 to each element of dquery
  // for each block of keys, clears it before and reads it after, all while the tensor cores work.
  const bool keys_apart = both_keys_image(planner, problem) == nullptr;
  const int64_t operations = (keys_apart ? 8 : 7) * 2 * problem.seqlen_k;  // for each element of dquery
  const int64_t bytes = 4 * (ceil_div(problem.seqlen_k, image->block_n) + 2);
  return bytes * kOperationsPerAddedByte <= operations ? image : nullptr;
}

void plan_two_passes(Planner& planner, BackwardArguments arguments) {
  const AttentionProblem& problem = arguments.problem;
  const int64_t row_blocks = ceil_div(problem.seqlen_q, kKeysPerTile), key_tiles = ceil_div(problem.seqlen_k, kKeysPerTile);
  if (arguments.dattn_mask.data != nullptr && (arguments.mask_batches != problem.batch || arguments.mask_heads != problem.num_heads)) {
    const Image& image = *find_image(planner, Pass::mask_gradient, problem, true);
    planner.launch(image, arguments.mask_batches * arguments.mask_heads * row_blocks * key_tiles, arguments);
    arguments.dattn_mask = {};  // the other kernels leave it alone
  }
  const Image& dquery = *find_image(planner, Pass::backward_query, problem, true);
  planner.launch(dquery, problem.batch * problem.num_heads * row_blocks, arguments);
  const int64_t key_blocks = problem.batch * problem.num_heads_kv * key_tiles;
  if (const Image* const both = both_keys_image(planner, problem)) {
    planner.launch(*both, key_blocks, arguments);
  } else {
    planner.launch(*find_image(planner, Pass::backward_dkey, problem, true), key_blocks, arguments);
    planner.launch(*find_image(planner, Pass::backward_dvalue, problem, true), key_blocks, arguments);
  }
}

void plan_backward(Planner& planner, const AttentionProblem& problem, const SideGradients& side) {
  OnePassArguments arguments;
  fill(arguments, problem);
  arguments.dattn_mask = side.dattn_mask;
  arguments.mask_batches = side.mask_batches;
  arguments.mask_heads = side.mask_heads;
  arguments.row_sums = side.row_sums;
  arguments.column_sums = side.column_sums;
  arguments.slope_sums = side.slope_sums;
  arguments.column_tiles = side.column_tiles;
  if (const Image* image = single_tile_backward_image(planner, problem, side)) return plan_single_tile_backward(planner, *image, arguments);

  const bool packed = problem.cu_seqlens_q != nullptr;
  const int64_t lines = packed ? problem.num_heads : problem.batch * problem.num_heads;
  const int64_t length = packed ? problem.num_tokens_q : problem.seqlen_q;
  arguments.row_lse = planner.take<float>(lines * length * 4);
  arguments.row_delta = planner.take<float>(lines * length * 4);
  const Image* const one_pass = one_pass_image(planner, problem, side);
  if (one_pass != nullptr) {
    arguments.dquery_sums = planner.take<float>(lines * length * problem.head_dim_qk * 4);
    if (side.deterministic) {
      // For all rows of the last listed tile, some of which may not exist.
      arguments.turns_per_head = ceil_div(ceil_div(problem.seqlen_q, kKeysPerTile) * kKeysPerTile, one_pass->block_m);
      arguments.num_turns = 1 + problem.batch * problem.num_heads * arguments.turns_per_head;
      arguments.turns = planner.take<uint32_t>(arguments.num_turns * 4);
    }
  }
  // In one pass, lists of rows only decide the turns; without lists by columns, positions do.
  if (one_pass == nullptr || problem.attn_mask.data != nullptr || problem.row_tiles.data != nullptr) {
    planner.plan_mask_tiles(kKeysPerTile, arguments, &arguments.column_tiles);
  }
  const auto launch_helper = [&](const char* bfloat16, const char* float16) {
    const Image& image = planner.named(problem.dtype == Dtype::bfloat16 ? bfloat16 : float16);
    planner.launch(image, lines * ceil_div(length, image.block_m), arguments);
  };
  launch_helper("backward_delta_bf16", "backward_delta_fp16");
  if (one_pass != nullptr) {
    planner.launch(*one_pass, problem.batch * problem.num_heads_kv * ceil_div(problem.seqlen_k, one_pass->block_n), arguments);
    launch_helper("backward_dquery_bf16", "backward_dquery_fp16");
  } else {
    plan_two_passes(planner, arguments);
  }
}

}  // namespace

const Family kFamily = {
    kPortableFamily,
    [](const AttentionProblem&, const DeviceLimits&) { return true; },
    [](const AttentionProblem&, const SideGradients&, const DeviceLimits&) { return true; },
    &plan_forward,
    &plan_backward,
};

}  // namespace sm80

bool set_single_tile_kernels(bool used) { return sm80::use_single_tile_kernels.exchange(used); }

}  // namespace fused_attention::cuda
