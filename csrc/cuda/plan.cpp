// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace fused_attention::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid along x
constexpr size_t kPieceAlignment = 256;                              // of each part of the workspace, as device allocations have

int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(base_ + size_);
    size_ += (static_cast<size_t>(bytes) + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
    return piece;
  }
  size_t size() const { return size_; }

 private:
  uintptr_t base_;
  size_t size_ = 0;
};

void check_pointer(const char* name, const StridedTensor& tensor, int64_t elements) {
  if (elements != 0 && tensor.data == nullptr) throw std::invalid_argument(std::string(name) + " has no memory");
  const int64_t bits = reinterpret_cast<intptr_t>(tensor.data) | 2 * (tensor.batch | tensor.head | tensor.row);
  if (bits % 16 != 0) throw std::invalid_argument(std::string(name) + " must have an address and strides that are multiples of 16 bytes");
}

// What unsupported_reasons in Python has looked at already: nothing is launched on unchecked pointers.
void check(const AttentionProblem& problem) {
  if (problem.dtype == Dtype::float32) throw std::invalid_argument("the CUDA kernels take bfloat16 and float16");
  if (problem.head_dim_qk % 8 != 0 || problem.head_dim_v % 8 != 0) throw std::invalid_argument("head_dim must be divisible by 8");
  if (!(problem.softmax_scale > 0) || !std::isfinite(problem.softmax_scale)) throw std::invalid_argument("scale must be finite and > 0");
  if (problem.num_heads_kv <= 0 || problem.num_heads % problem.num_heads_kv != 0) {
    throw std::invalid_argument("the heads of query must be a multiple of those of key");
  }
  if (std::max(problem.seqlen_q, problem.seqlen_k) + std::abs(int64_t{problem.diagonal}) > kUnlimited) {
    throw std::invalid_argument("sequences may have 2^30 queries and keys at most, less the diagonal's distance from their starts");
  }
  const bool packed = problem.cu_seqlens_q != nullptr;
  if (packed != (problem.cu_seqlens_k != nullptr)) throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k come together");
  const int64_t keys = packed ? problem.num_tokens_k : problem.seqlen_k;
  check_pointer("query", problem.query, packed ? problem.num_tokens_q : 1);
  check_pointer("key", problem.key, keys);
  check_pointer("value", problem.value, keys);
  if (problem.out.data == nullptr || problem.lse == nullptr) throw std::invalid_argument("out and lse must have memory");
  const bool draws = problem.dropout_threshold > 0;
  if (draws && (problem.dropout_threshold >= 65536 || problem.rng_state == nullptr)) {
    throw std::invalid_argument("dropout needs a threshold below 65536 and rng_state");
  }
}

FeatureClass feature_class(const AttentionProblem& problem) {
  if (problem.attn_mask.data != nullptr && problem.attn_mask_dtype != MaskDtype::boolean) return FeatureClass::bias;
  const void* const sources[] = {problem.attn_mask.data, problem.key_mask,       problem.key_lengths,  problem.query_lengths,
                                 problem.cu_seqlens_q,   problem.mask_bits.data, problem.alibi_slopes, problem.sinks};
  const bool masked = std::any_of(std::begin(sources), std::end(sources), [](const void* source) { return source != nullptr; });
  return masked || problem.softcap != 0 ? FeatureClass::masked : FeatureClass::plain;
}

const Image& named_image(const char* name) {
  for (int i = 0; i < kNumImages; ++i) {
    if (std::strcmp(kImages[i].name, name) == 0) return kImages[i];
  }
  throw std::runtime_error(std::string("this build has no CUDA kernel ") + name);
}

// The narrowest instance that the head dims fit in and that fits the device; null when `required` is false and there is none.
const Image* find_image(Pass pass, const AttentionProblem& problem, const DeviceLimits& limits, bool required) {
  FeatureClass wanted = pass == Pass::decode ? FeatureClass::masked : feature_class(problem);
  const bool is_short = pass == Pass::short_forward || pass == Pass::short_backward;
  if (is_short && wanted == FeatureClass::plain) wanted = FeatureClass::masked;
  const bool dropout = wanted == FeatureClass::plain && problem.dropout_threshold > 0;  // the others decide at run time
  const Image* best = nullptr;
  const Image* too_large = nullptr;
  for (int i = 0; i < kNumImages; ++i) {
    const Image& image = kImages[i];
    if (image.pass != pass || image.dtype != problem.dtype || image.feature_class != wanted || image.dropout != dropout) continue;
    if (image.head_dim_qk < problem.head_dim_qk || image.head_dim_v < problem.head_dim_v) continue;
    if (image.shared_bytes > limits.shared_bytes) {
      too_large = &image;
    } else if (best == nullptr || image.head_dim_qk + image.head_dim_v < best->head_dim_qk + best->head_dim_v) {
      best = &image;
    }
  }
  if (best != nullptr || !required) return best;
  if (too_large != nullptr) {
    throw std::runtime_error(std::string("CUDA kernel ") + too_large->name + " needs " + std::to_string(too_large->shared_bytes) +
                             " bytes of shared memory a block, this GPU has " + std::to_string(limits.shared_bytes) +
                             ": use backend='triton'");
  }
  throw std::runtime_error("this build has no CUDA kernel for head dims " + std::to_string(problem.head_dim_qk) + " and " +
                           std::to_string(problem.head_dim_v) + (kNumImages == 0 ? std::string(": ") + kWhyNoImages : std::string()));
}

template <class Arguments>
void add_launch(Plan& plan, const Image& image, int64_t blocks, int threads, const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks > kMaxBlocks) {
    throw std::invalid_argument(std::string("CUDA kernel ") + image.name + " would need " + std::to_string(blocks) +
                                " blocks, a grid has 2^31 - 1 at most: split the batch");
  }
  Launch& launch = plan.launches.emplace_back();
  launch.image = &image;
  launch.blocks = static_cast<uint32_t>(blocks);
  launch.threads = static_cast<uint32_t>(threads);
  launch.shared_bytes = static_cast<uint32_t>(image.shared_bytes);
  launch.argument_bytes = sizeof(Arguments);
  std::memcpy(launch.arguments, &arguments, sizeof(Arguments));
}

// What tells full, mixed and empty tiles of block_m x 64 scores apart, where loop bounds do not; leaves its result in `arguments`, and that
// of a bool mask by columns in column_tiles where that is asked for.
void plan_mask_tiles(Plan& plan, Workspace& workspace, int block_m, ForwardArguments& arguments, TileLists* column_tiles = nullptr) {
  AttentionProblem& problem = arguments.problem;
  const bool bool_mask = problem.attn_mask.data != nullptr && problem.attn_mask_dtype == MaskDtype::boolean;
  const bool prepared = problem.row_tiles.data != nullptr;
  if (prepared && block_m == kKeysPerTile) {
    arguments.tiles = problem.row_tiles;
  } else if (prepared || bool_mask || problem.key_mask != nullptr) {
    MaskArguments mask(problem, block_m, bool_mask && column_tiles != nullptr);
    if (mask.num_tiles() > kMaxBlocks) {
      throw std::invalid_argument("the masks have " + std::to_string(mask.num_tiles()) +
                                  " tiles, kernels list 2^31 - 1 at most: split the batch");
    }
    mask.lists = workspace.take<int32_t>(mask.lists_bytes());
    if (prepared) {
      add_launch(plan, named_image("mask_tiles_merge"), mask.list_blocks(), kMaskThreads, mask);
    } else if (bool_mask) {
      mask.mask_bits = workspace.take<uint32_t>(mask.mask_bits_bytes());
      mask.kinds = workspace.take<uint8_t>(mask.kinds_bytes());
      add_launch(plan, named_image("mask_tiles_classify"), mask.classify_blocks(), 2 * block_m, mask);
      add_launch(plan, named_image("mask_tiles_list"), mask.list_blocks(), kMaskThreads, mask);
      problem.mask_bits = mask.bits();
      if (column_tiles != nullptr) {
        mask.by_columns = true;
        int32_t* const lists = mask.lists;
        mask.lists = workspace.take<int32_t>(mask.column_lists_bytes());
        add_launch(plan, named_image("mask_tiles_list"), mask.list_blocks(), kMaskThreads, mask);
        *column_tiles = mask.column_tiles();
        mask.lists = lists;
      }
    } else {
      add_launch(plan, named_image("mask_tiles_keys"), mask.list_blocks(), kMaskThreads, mask);
    }
    arguments.tiles = mask.tiles();
  }
  if (bool_mask) problem.attn_mask = {};
}

// Enough blocks to keep every processor busy; from sizes alone, never from lengths, which are on the device.
int num_splits(const AttentionProblem& problem, const DeviceLimits& limits, int64_t unsplit_blocks) {
  const int64_t visible = std::min(problem.seqlen_k, problem.seqlen_q + problem.window_left + problem.window_right);
  const int64_t wanted = ceil_div(static_cast<int64_t>(kBlocksPerProcessor) * limits.multiprocessors, unsplit_blocks);
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, int64_t{kMaxSplits}, ceil_div(visible, kKeysPerSplit)})));
}

// The decoding kernel that takes this call, or null: it is for few rows whose masks need nothing but their position.
const Image* decode_image(const AttentionProblem& problem, const DeviceLimits& limits) {
  const int64_t rows = problem.num_heads / problem.num_heads_kv * problem.seqlen_q;
  const bool masks = problem.attn_mask.data != nullptr || problem.row_tiles.data != nullptr || problem.query_lengths != nullptr;
  if (rows > kMaxDecodeRows || masks || problem.cu_seqlens_q != nullptr || problem.dropout_threshold != 0) return nullptr;
  const Image* image = find_image(Pass::decode, problem, limits, false);
  // Several blocks of rows read the same keys: only where that keeps processors busy which the forward kernel would leave idle.
  const bool idle = problem.batch * problem.num_heads < limits.multiprocessors;
  return image != nullptr && (rows <= image->block_m || idle) ? image : nullptr;
}

void plan_decode(Plan& plan, Workspace& workspace, const Image& image, const DeviceLimits& limits, ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  const int64_t lines = problem.batch * problem.num_heads * problem.seqlen_q;
  const int64_t row_blocks = ceil_div(arguments.heads_per_group * problem.seqlen_q, image.block_m);
  const int64_t unsplit_blocks = problem.batch * problem.num_heads_kv * row_blocks;
  const int splits = num_splits(problem, limits, unsplit_blocks);
  arguments.num_splits = splits;
  if (splits > 1) {
    arguments.partial_out = workspace.take<float>(splits * lines * problem.head_dim_v * sizeof(float));
    arguments.partial_lse = workspace.take<float>(splits * lines * sizeof(float));
  }
  add_launch(plan, image, unsplit_blocks * splits, image.num_threads, arguments);
  if (splits > 1) {
    const Image& combine = named_image(problem.dtype == Dtype::bfloat16 ? "sm80_combine_bf16" : "sm80_combine_fp16");
    add_launch(plan, combine, ceil_div(lines, combine.block_m), combine.num_threads, arguments);
  }
}

std::atomic<bool> use_short_kernels{true};

// The kernel for short sequences that takes this call, or null: where all keys of a head fit in shared memory. With many rows a warp of
// the other forward kernels computes more of them for what it reads of the keys.
const Image* short_image(Pass pass, const AttentionProblem& problem, const DeviceLimits& limits) {
  if (!use_short_kernels || problem.seqlen_k > kMaxShortKeys) return nullptr;
  if (pass == Pass::short_forward && problem.seqlen_q > kMaxShortRows) return nullptr;
  const Image* image = find_image(pass, problem, limits, false);
  const int64_t rows = problem.num_heads / problem.num_heads_kv * ceil_div(problem.seqlen_q, kRowsPerWarp);
  return image != nullptr && problem.batch * problem.num_heads_kv * rows <= kMaxBlocks ? image : nullptr;
}

// A block takes as many units as there is room for, where that leaves no processor without a block.
template <class Arguments>
void add_short_launch(Plan& plan, const Image& image, const DeviceLimits& limits, int most_warps, const Arguments& arguments) {
  const ShortUnits& units = arguments.units;
  const int64_t room = std::min<int64_t>(most_warps / units.warps, image.shared_bytes / units.shared_bytes);
  const int64_t groups = std::max<int64_t>(1, std::min<int64_t>(room, units.count / std::max(limits.multiprocessors, 1)));
  add_launch(plan, image, ceil_div(units.count, groups), static_cast<int>(32 * units.warps * groups), arguments);
  plan.launches.back().shared_bytes = static_cast<uint32_t>(units.shared_bytes * groups);
}

void plan_short_forward(Plan& plan, const Image& image, const DeviceLimits& limits, ForwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  ShortUnits& units = arguments.units;
  const int most_warps = image.num_threads / 32;
  const int64_t pieces = arguments.heads_per_group * ceil_div(problem.seqlen_q, kRowsPerWarp);
  const int64_t per_key_head = ceil_div(pieces, most_warps), warps = ceil_div(pieces, per_key_head);
  const int64_t keys = ceil_div(problem.seqlen_k, kKeysPerWord) * kKeysPerWord;
  units.per_key_head = static_cast<int32_t>(per_key_head);
  units.warps = static_cast<int32_t>(warps);
  units.count = static_cast<uint32_t>(problem.batch * problem.num_heads_kv * per_key_head);
  units.shared_bytes = static_cast<int32_t>(2 * (kRowsPerWarp * warps * image.head_dim_qk + keys * (image.head_dim_qk + image.head_dim_v)));
  add_short_launch(plan, image, limits, most_warps, arguments);
}

// The kernel for short sequences that computes every gradient of this call, or null. A group of warps takes all rows of a key head: not
// where these are many and there are too few key heads to keep processors busy. Of a mask's gradients it stores those of every score, or
// sums those of a mask of one row.
const Image* short_backward_image(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits) {
  if (side.kernels != BackwardKernels::chosen) return nullptr;
  const int64_t units = problem.batch * problem.num_heads_kv, rows = problem.num_heads / problem.num_heads_kv * problem.seqlen_q;
  if (rows > kMaxShortRows && units < limits.multiprocessors) return nullptr;
  const StridedTensor& mask = side.dattn_mask;
  const bool shared = (problem.batch > 1 && mask.batch == 0) || (problem.num_heads > 1 && mask.head == 0);
  if (side.row_sums != nullptr || (mask.data != nullptr && shared)) return nullptr;
  return short_image(Pass::short_backward, problem, limits);
}

void plan_short_backward(Plan& plan, const Image& image, const DeviceLimits& limits, BackwardArguments& arguments) {
  const AttentionProblem& problem = arguments.problem;
  ShortUnits& units = arguments.units;
  const int64_t head_dims = image.head_dim_qk + image.head_dim_v, tile_bytes = image.block_m * (2 * head_dims + 8);
  const int64_t warps = ceil_div(problem.seqlen_k, kRowsPerWarp);
  const int64_t fixed_bytes = warps * kRowsPerWarp * 2 * (head_dims + image.block_m) + kShortNotesBytes;
  const int64_t tiles = arguments.heads_per_group * ceil_div(problem.seqlen_q, image.block_m);
  const int64_t in_flight = std::min({tiles, int64_t{kMaxRowTilesInFlight}, (image.shared_bytes - fixed_bytes) / tile_bytes});
  units.warps = static_cast<int32_t>(warps);
  units.count = static_cast<uint32_t>(problem.batch * problem.num_heads_kv);
  units.row_tiles_in_flight = static_cast<int32_t>(in_flight);
  units.shared_bytes = static_cast<int32_t>(fixed_bytes + in_flight * tile_bytes);
  add_short_launch(plan, image, limits, std::max<int>(kShortBlockWarps, units.warps), arguments);
}

void fill(ForwardArguments& arguments, const AttentionProblem& problem) {
  arguments.problem = problem;
  const double scale = problem.softmax_scale, softcap = problem.softcap;
  arguments.score_scale = static_cast<float>(softcap != 0 ? scale / softcap : scale * kLog2E);
  arguments.softcap_log2 = static_cast<float>(softcap * kLog2E);
  arguments.kept_scale = problem.dropout_scale();
  arguments.heads_per_group = static_cast<int32_t>(problem.num_heads / problem.num_heads_kv);
}

}  // namespace

bool set_short_kernels(bool used) { return use_short_kernels.exchange(used); }

Plan plan_forward(const AttentionProblem& problem, const DeviceLimits& limits, void* workspace_memory) {
  Plan plan;
  if (problem.batch == 0 || problem.num_heads == 0 || problem.seqlen_q == 0) return plan;
  check(problem);
  ForwardArguments arguments;
  fill(arguments, problem);
  Workspace workspace(workspace_memory);
  const Image *const decode = decode_image(problem, limits), *const whole = short_image(Pass::short_forward, problem, limits);
  if (decode != nullptr && (whole == nullptr || arguments.heads_per_group * problem.seqlen_q <= decode->block_m)) {
    plan_decode(plan, workspace, *decode, limits, arguments);
  } else if (whole != nullptr) {
    plan_short_forward(plan, *whole, limits, arguments);
  } else {
    const Image& image = *find_image(Pass::forward, problem, limits, true);
    plan_mask_tiles(plan, workspace, image.block_m, arguments);
    const int64_t blocks = problem.batch * problem.num_heads * ceil_div(problem.seqlen_q, image.block_m);
    add_launch(plan, image, blocks, image.num_threads, arguments);
  }
  plan.workspace_bytes = workspace.size();
  return plan;
}

namespace {

// The kernel of two passes that computes dkey and dvalue together, or null where each has one of its own that fits the head dims better.
const Image* both_keys_image(const AttentionProblem& problem, const DeviceLimits& limits) {
  const Image* const both = find_image(Pass::backward_key, problem, limits, false);
  const Image* const dkey = find_image(Pass::backward_dkey, problem, limits, both == nullptr);
  if (both == nullptr || dkey == nullptr) return both;
  return both->head_dim_qk + both->head_dim_v <= dkey->head_dim_qk + dkey->head_dim_v ? both : nullptr;
}

// The kernel that computes the gradients in one pass where that is wanted, or null.
const Image* one_pass_image(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits) {
  if (side.kernels == BackwardKernels::two_passes) return nullptr;
  const bool asked_for = side.kernels == BackwardKernels::one_pass;
  // What is summed over keys would be in another order in every run.
  const bool sums_over_keys = side.row_sums != nullptr || side.slope_sums != nullptr;
  const bool bias = feature_class(problem) == FeatureClass::bias;
  const Image* const image = sums_over_keys || bias ? nullptr : find_image(Pass::backward, problem, limits, asked_for);
  if (asked_for && image == nullptr)
    throw std::invalid_argument("the backward in one pass takes no float attn_mask and no slopes' gradients");
  if (asked_for || image == nullptr) return image;
  // Two passes have two more products, and a third where dkey and dvalue have a kernel each. One pass adds a float32 number to each element
  // of dquery for each block of keys, clears it before and reads it afterwards, all while the tensor cores work.
  const bool keys_apart = both_keys_image(problem, limits) == nullptr;
  const int64_t operations = (keys_apart ? 8 : 7) * 2 * problem.seqlen_k;  // for each element of dquery
  const int64_t bytes = 4 * (ceil_div(problem.seqlen_k, image->block_n) + 2);
  return bytes * kOperationsPerAddedByte <= operations ? image : nullptr;
}

void plan_two_passes(Plan& plan, const DeviceLimits& limits, BackwardArguments arguments) {
  const AttentionProblem& problem = arguments.problem;
  const auto launch = [&](const Image& image, int64_t blocks) { add_launch(plan, image, blocks, image.num_threads, arguments); };
  const int64_t row_blocks = ceil_div(problem.seqlen_q, kKeysPerTile), key_tiles = ceil_div(problem.seqlen_k, kKeysPerTile);
  if (arguments.dattn_mask.data != nullptr && (arguments.mask_batches != problem.batch || arguments.mask_heads != problem.num_heads)) {
    const Image& image = *find_image(Pass::mask_gradient, problem, limits, true);
    launch(image, arguments.mask_batches * arguments.mask_heads * row_blocks * key_tiles);
    arguments.dattn_mask = {};  // the other kernels leave it alone
  }
  launch(*find_image(Pass::backward_query, problem, limits, true), problem.batch * problem.num_heads * row_blocks);
  const int64_t key_blocks = problem.batch * problem.num_heads_kv * key_tiles;
  if (const Image* const both = both_keys_image(problem, limits)) {
    launch(*both, key_blocks);
  } else {
    launch(*find_image(Pass::backward_dkey, problem, limits, true), key_blocks);
    launch(*find_image(Pass::backward_dvalue, problem, limits, true), key_blocks);
  }
}

}  // namespace

Plan plan_backward(const AttentionProblem& problem, const SideGradients& side, const DeviceLimits& limits, void* workspace_memory) {
  Plan plan;
  if (problem.batch == 0 || problem.num_heads == 0) return plan;
  check(problem);
  const bool packed = problem.cu_seqlens_q != nullptr;
  check_pointer("dout", problem.dout, packed ? problem.num_tokens_q : problem.seqlen_q);
  check_pointer("dquery", problem.dquery, packed ? problem.num_tokens_q : problem.seqlen_q);
  check_pointer("dkey", problem.dkey, packed ? problem.num_tokens_k : problem.seqlen_k);
  check_pointer("dvalue", problem.dvalue, packed ? problem.num_tokens_k : problem.seqlen_k);
  OnePassArguments arguments;
  fill(arguments, problem);
  arguments.dattn_mask = side.dattn_mask;
  arguments.mask_batches = side.mask_batches;
  arguments.mask_heads = side.mask_heads;
  arguments.row_sums = side.row_sums;
  arguments.column_sums = side.column_sums;
  arguments.slope_sums = side.slope_sums;
  arguments.column_tiles = side.column_tiles;
  if (const Image* image = short_backward_image(problem, side, limits)) {
    plan_short_backward(plan, *image, limits, arguments);
    return plan;
  }
  Workspace workspace(workspace_memory);
  const int64_t lines = packed ? problem.num_heads : problem.batch * problem.num_heads;
  const int64_t length = packed ? problem.num_tokens_q : problem.seqlen_q;
  arguments.row_lse = workspace.take<float>(lines * length * 4);
  arguments.row_delta = workspace.take<float>(lines * length * 4);
  const Image* const one_pass = one_pass_image(problem, side, limits);
  if (one_pass != nullptr) {
    arguments.dquery_sums = workspace.take<float>(lines * length * problem.head_dim_qk * 4);
    if (side.deterministic) {
      // Of all the rows of a last tile that lists name, some of which may not be there.
      arguments.turns_per_head = ceil_div(ceil_div(problem.seqlen_q, kKeysPerTile) * kKeysPerTile, one_pass->block_m);
      arguments.num_turns = 1 + problem.batch * problem.num_heads * arguments.turns_per_head;
      arguments.turns = workspace.take<uint32_t>(arguments.num_turns * 4);
    }
  }
  // In one pass lists of rows only say whose turn it is, and where there are none by columns that follows from positions.
  if (one_pass == nullptr || problem.attn_mask.data != nullptr || problem.row_tiles.data != nullptr) {
    plan_mask_tiles(plan, workspace, kKeysPerTile, arguments, &arguments.column_tiles);
  }
  const auto helper = [&](const char* bfloat16, const char* float16) {
    const Image& image = named_image(problem.dtype == Dtype::bfloat16 ? bfloat16 : float16);
    add_launch(plan, image, lines * ceil_div(length, image.block_m), image.num_threads, arguments);
  };
  helper("sm80_backward_delta_bf16", "sm80_backward_delta_fp16");
  if (one_pass != nullptr) {
    const int64_t blocks = problem.batch * problem.num_heads_kv * ceil_div(problem.seqlen_k, one_pass->block_n);
    add_launch(plan, *one_pass, blocks, one_pass->num_threads, arguments);
    helper("sm80_backward_dquery_bf16", "sm80_backward_dquery_fp16");
  } else {
    plan_two_passes(plan, limits, arguments);
  }
  plan.workspace_bytes = workspace.size();
  return plan;
}

}  // namespace fused_attention::cuda
