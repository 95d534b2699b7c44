// SPDX-License-Identifier: Apache-2.0
#include "planner.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace fused_attention::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid along x

}  // namespace

FeatureClass feature_class(const AttentionProblem& problem) {
  if (problem.attn_mask.data != nullptr && problem.attn_mask_dtype != MaskDtype::boolean) return FeatureClass::bias;
  const void* const sources[] = {problem.attn_mask.data, problem.key_mask,       problem.key_lengths,  problem.query_lengths,
                                 problem.cu_seqlens_q,   problem.mask_bits.data, problem.alibi_slopes, problem.sinks};
  const bool masked = std::any_of(std::begin(sources), std::end(sources), [](const void* source) { return source != nullptr; });
  return masked || problem.softcap != 0 ? FeatureClass::masked : FeatureClass::plain;
}

void fill(ForwardArguments& arguments, const AttentionProblem& problem) {
  arguments.problem = problem;
  const double scale = problem.softmax_scale, softcap = problem.softcap;
  arguments.score_scale = static_cast<float>(softcap != 0 ? scale / softcap : scale * kLog2E);
  arguments.softcap_log2 = static_cast<float>(softcap * kLog2E);
  arguments.kept_scale = problem.dropout_scale();
  arguments.heads_per_group = static_cast<int32_t>(problem.num_heads / problem.num_heads_kv);
}

const Image* Planner::find(Pass pass, FeatureClass wanted, const AttentionProblem& problem, bool required) const {
  const bool dropout = wanted == FeatureClass::plain && problem.dropout_threshold > 0;  // the others decide at run time
  const Image* best = nullptr;
  const Image* too_large = nullptr;
  for (int i = 0; i < kNumImages; ++i) {
    const Image& image = kImages[i];
    if (image.family != family_ || image.pass != pass || image.dtype != problem.dtype || image.feature_class != wanted ||
        image.dropout != dropout)
      continue;
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

const Image& Planner::named(const char* name) const {
  for (int i = 0; i < kNumImages; ++i) {
    if (std::strcmp(kImages[i].name, name) == 0 && runs_on(kImages[i].family, limits.compute_capability)) return kImages[i];
  }
  throw std::runtime_error(std::string("this build has no CUDA kernel ") + name);
}

void Planner::check_grid(const Image& image, int64_t blocks) {
  if (blocks <= kMaxBlocks) return;
  throw std::invalid_argument(std::string("CUDA kernel ") + image.name + " would need " + std::to_string(blocks) +
                              " blocks, a grid has 2^31 - 1 at most: split the batch");
}

void Planner::plan_mask_tiles(int block_m, ForwardArguments& arguments, TileLists* column_tiles) {
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
    mask.lists = take<int32_t>(mask.lists_bytes());
    if (prepared) {
      launch(named("mask_tiles_merge"), mask.list_blocks(), kMaskThreads, 0, mask);
    } else if (bool_mask) {
      mask.mask_bits = take<uint32_t>(mask.mask_bits_bytes());
      mask.kinds = take<uint8_t>(mask.kinds_bytes());
      launch(named("mask_tiles_classify"), mask.classify_blocks(), 2 * block_m, 0, mask);
      launch(named("mask_tiles_list"), mask.list_blocks(), kMaskThreads, 0, mask);
      problem.mask_bits = mask.bits();
      if (column_tiles != nullptr) {
        mask.by_columns = true;
        int32_t* const lists = mask.lists;
        mask.lists = take<int32_t>(mask.column_lists_bytes());
        launch(named("mask_tiles_list"), mask.list_blocks(), kMaskThreads, 0, mask);
        *column_tiles = mask.column_tiles();
        mask.lists = lists;
      }
    } else {
      launch(named("mask_tiles_keys"), mask.list_blocks(), kMaskThreads, 0, mask);
    }
    arguments.tiles = mask.tiles();
  }
  if (bool_mask) problem.attn_mask = {};
}

}  // namespace fused_attention::cuda
