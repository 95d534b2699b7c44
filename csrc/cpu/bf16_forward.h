// SPDX-License-Identifier: Apache-2.0
// Forward on bf16 tiles, multiplied by Tiles (AmxTiles or DotProductTiles), of bfloat16 numbers or of float32 numbers in two parts, as
// Storage says. A task is up to rows_per_task query rows of one (batch, head);
// for each block of keys it
//
//   1. packs K and V of the block (once per head when one block holds all keys),
//   2. for each 32 query rows and each run of keys that they see: S = Q K^T (fp32), online softmax on S, P to bf16, acc += P V,
//
// and divides acc by the row sums at the end (Milakov and Gimelshein 2018; Dao 2023): those of the rounded P, so that rounding does not
// change what the weights sum to; lse gets the exact ones. Rows of S are reduced 16 at a time, so that maxima, sums, rescaling factors and
// lse are vectors with one lane per row.
#pragma once
#include "bf16_tiles.h"
#include "few_rows_forward.h"

namespace fused_attention::cpu::FA_ISA {

template <class Tiles, class Storage = Bf16Storage>
class Bf16Forward {
 public:
  static Plan plan(const AttentionProblem& problem, int num_threads) {
    if (!Tiles::pay(problem)) return widened().plan(problem, num_threads);
    if (problem.seqlen_q <= kFewRows) return FewRowsForward<Number>::plan(problem, num_threads);  // packing would not pay off
    const int64_t heads = problem.batch * problem.num_heads, wanted_tasks = 4 * int64_t{num_threads};
    int64_t rows = problem.head_dim_v > 128 || problem.head_dim_qk > 128 ? 256 : 512;
    const int64_t step = problem.row_tiles.data ? 64 : kRows;  // tasks start at tile boundaries
    rows = min_of(rows, max_of(round_up(problem.seqlen_q, step), step));
    while (rows > 2 * kRows && heads * divide_up(problem.seqlen_q, rows) < wanted_tasks) rows = round_up(rows / 2, step);
    Plan plan{};
    plan.num_tasks = heads * divide_up(problem.seqlen_q, rows);
    plan.task_size = rows;
    Bf16Forward forward(problem, plan);
    plan.scratch_bytes = forward.carve(nullptr);
    return with_few_rows<Number>(problem, plan);
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    if (!Tiles::pay(problem)) return widened().run(problem, plan, first_task, last_task, scratch);
    if (problem.seqlen_q <= kFewRows) return FewRowsForward<Number>::run(problem, plan, first_task, last_task, scratch);
    Bf16Forward forward(problem, plan);
    const int64_t num_tasks = problem.batch * problem.num_heads * forward.tasks_per_head_;
    forward.run_tasks(first_task, min_of(last_task, num_tasks), scratch);
    run_few_rows<Number>(problem, num_tasks, first_task, last_task, scratch);
  }

 private:
  using Element = typename Storage::Element;
  using Number = typename Storage::Number;
  static constexpr int64_t kBytes = sizeof(Element);

  static const Kernel& widened() { return kAvx512Kernels.forward[static_cast<int>(Storage::kDtype)]; }

  static constexpr int64_t kRows = 32;      // query rows per block of scores
  static constexpr int64_t kMaxKeys = 512;  // keys per packed block: long enough that the online softmax rarely rescales
  static constexpr int kDegree = Storage::kParts == 1 ? 4 : 5;  // of exp2; a lower one would show in lse or in out

  Bf16Forward(const AttentionProblem& problem, const Plan& plan)
      : problem_(problem),
        rows_per_task_(plan.task_size),
        tasks_per_head_(max_of(divide_up(problem.seqlen_q, plan.task_size), int64_t{1})),
        dim_qk_(round_up(problem.head_dim_qk, 32)),
        dim_v_(round_up(problem.head_dim_v, 32)),
        block_keys_(min_of(kMaxKeys, round_up(max_of(problem.seqlen_k, int64_t{1}), 32))),
        single_block_(problem.seqlen_k <= block_keys_),
        held_rows_(single_block_ ? kRows : plan.task_size),
        score_stride_(block_keys_ + 16),
        weight_stride_(block_keys_ + 32),
        dropping_(problem.dropout_threshold > 0 && problem.dropout_threshold < 65536),
        score_scale_(problem.softmax_scale * kLog2e),
        softcap_(problem),
        score_bias_(problem) {}

  size_t carve(char* memory) {
    Arena arena(memory);
    packed_key_ = take_parts<Storage>(arena, block_keys_ * dim_qk_), packed_value_ = take_parts<Storage>(arena, block_keys_ * dim_v_);
    packed_query_ = take_parts<Storage>(arena, held_rows_ * dim_qk_);
    acc_ = arena.take<float>(held_rows_ * dim_v_);
    row_max_ = arena.take<float>(held_rows_), row_sum_ = arena.take<float>(held_rows_), weight_sum_ = arena.take<float>(held_rows_);
    scores_ = arena.take<float>(kRows * score_stride_);
    weights_ = take_parts<Storage>(arena, kRows * weight_stride_);
    if (dropping_) keep_bits_ = arena.take<uint16_t>(kRows * block_keys_ / 16);
    if (problem_.key_mask) present_bits_ = arena.take<uint16_t>(round_up(problem_.seqlen_k, 32) / 16);
    if (problem_.key_mask) key_bias_ = arena.take<float>(round_up(problem_.seqlen_k, 16) + 16);
    bias_ = arena.take<float>(block_keys_);
    started_ = arena.take<uint8_t>(held_rows_ / kRows);
    if (problem_.row_tiles.data) tile_kinds_ = arena.take<uint8_t>(problem_.row_tiles.num_tiles * divide_up(rows_per_task_, 64));
    return arena.used();
  }

  void run_tasks(int64_t first_task, int64_t last_task, char* scratch) {
    if (first_task >= last_task) return;
    carve(scratch);
    [[maybe_unused]] const Tiles tiles;
    for (int64_t task = first_task; task < last_task; ++task) run_task(task, last_task);
  }

  void run_task(int64_t task, int64_t last_task) {
    const int64_t row0 = task % tasks_per_head_ * rows_per_task_;
    set_head(task / tasks_per_head_);
    const int64_t rows = min_of(rows_per_task_, bounds_.rows - row0);
    const bool has_few_rows = bounds_.seqlen_q <= kFewRows;  // FewRowsForward computes and stores the first kFewRows
    const int64_t live_rows = has_few_rows ? 0 : max_of(int64_t{0}, min_of(rows, bounds_.seqlen_q - row0));
    for (int64_t row = 0; tile_kinds_ && row < live_rows; row += 64)
      expand_tiles(problem_.row_tiles, batch_, head_, (row0 + row) / 64, tile_kinds_ + row / 64 * problem_.row_tiles.num_tiles);
    const int64_t first_key = live_rows > 0 ? first_visible_key(bounds_, row0) / block_keys_ * block_keys_ : 0;
    const int64_t last_key = live_rows > 0 ? visible_keys(bounds_, row0 + live_rows - 1) : 0;
    if (!single_block_)
      for (int64_t first = 0; first < live_rows; first += kRows) clear_statistics(first);
    for (int64_t key0 = first_key; key0 < last_key; key0 += block_keys_) {
      // A single block serves the whole head; otherwise this task packs up to the last key its last row sees.
      const int64_t keys = min_of(block_keys_, (single_block_ ? bounds_.seqlen_k : last_key) - key0);
      if (!single_block_ || packed_head_ != batch_ * problem_.num_heads_kv + kv_head_) pack_keys(key0, keys);
      for (int64_t first = 0; first < live_rows; first += kRows) {
        const int64_t block_rows = min_of(kRows, live_rows - first), held = single_block_ ? 0 : first;
        if (key0 == first_key) {
          pack_query(row0 + first, block_rows, packed_query_ + held * dim_qk_);
          if (single_block_) clear_statistics(0);
        }
        plan_prefetch(task, last_task, row0 + first, block_rows, key0);
        attend(row0 + first, block_rows, held, key0, tile_kinds(first, key0));
        if (single_block_) store_rows(row0 + first, block_rows, 0);
      }
    }
    const bool unseen = last_key <= first_key;
    if (single_block_ && unseen) clear_statistics(0);
    if (!single_block_ || unseen)
      for (int64_t first = 0; first < live_rows; first += kRows)
        store_rows(row0 + first, min_of(kRows, live_rows - first), single_block_ ? 0 : first);
    const int64_t stored = has_few_rows && row0 == 0 ? kFewRows : live_rows;
    store_absent_rows(row0 + stored, rows - stored);
  }

  Element* out_row(int64_t row) const { return row_ptr<Element>(problem_.out, batch_, head_, bounds_.first_query + row); }
  Element* out_error_row(int64_t row) const {
    return row_ptr_or_null<Element>(problem_.out_error, batch_, head_, bounds_.first_query + row);
  }
  float* lse_row(int64_t row) const { return problem_.lse + lse_offset(problem_, bounds_, batch_, head_) + row; }
  // The tile kinds for the task's rows from `row` on and keys from key0 on; null without a PreparedMask.
  const uint8_t* tile_kinds(int64_t row, int64_t key0) const {
    return tile_kinds_ ? tile_kinds_ + row / 64 * problem_.row_tiles.num_tiles + key0 / 64 : nullptr;
  }

  void set_head(int64_t batch_head) {
    head_ = batch_head % problem_.num_heads;
    kv_head_ = key_head(problem_, head_);
    if (const int64_t batch = batch_head / problem_.num_heads; batch != batch_) {
      batch_ = batch;
      bounds_ = sequence_bounds(problem_, batch_);
      if (problem_.key_mask) {
        has_holes_ = fill_present_bits(problem_, batch_, bounds_.seqlen_k, present_bits_);
        fill_key_bias(problem_, batch_, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
      }
    }
    score_bias_.enter(bounds_, batch_, head_, has_holes_ ? key_bias_ : nullptr);
  }

  // Resets the statistics of 32 rows. A sink is a key without a value that every row has already seen.
  void clear_statistics(int64_t held) {
    const float sink = problem_.sinks ? problem_.sinks[head_] * kLog2e : -kInfinity;
    for (int64_t i = held; i < held + kRows; i += 16) {
      const __m512 sum = _mm512_set1_ps(sink == -kInfinity ? 0.0f : 1.0f);
      _mm512_store_ps(row_max_ + i, _mm512_set1_ps(sink));
      _mm512_store_ps(row_sum_ + i, sum);
      _mm512_store_ps(weight_sum_ + i, sum);
    }
    started_[held / kRows] = 0;
  }

  void pack_query(int64_t row, int64_t rows, const Parts& packed) {
    const auto query = rows_of<Storage>(problem_.query, batch_, head_, bounds_.first_query + row, rows, problem_.head_dim_qk);
    for (int part = 0; part < Storage::kParts; ++part) pack_rows(query, part, round_up(rows, 16), dim_qk_, packed.at(part));
  }

  void pack_keys(int64_t key0, int64_t keys) {
    const uint16_t* present = has_holes_ ? present_bits_ + key0 / 16 : nullptr;
    const int64_t keys_padded = round_up(keys, 32), row = bounds_.first_key + key0;
    const auto key = rows_of<Storage>(problem_.key, batch_, kv_head_, row, keys, problem_.head_dim_qk, present),
               value = rows_of<Storage>(problem_.value, batch_, kv_head_, row, keys, problem_.head_dim_v, present);
    for (int part = 0; part < Storage::kParts; ++part) {
      pack_pairs_along_head_dim(key, part, keys_padded, dim_qk_, packed_key_.at(part));
      pack_pairs_along_sequence(value, part, keys_padded, dim_v_, packed_value_.at(part));
    }
    packed_head_ = batch_ * problem_.num_heads_kv + kv_head_;
  }

  // Query rows [row0, row0 + rows), whose state is at rows `held`, attend to the packed block of keys that starts at key0.
  void attend(int64_t row0, int64_t rows, int64_t held, int64_t key0, const uint8_t* kinds) {
    const int64_t first_key = max_of(first_visible_key(bounds_, row0) - key0, int64_t{0}) / 64 * 64,
                  keys_end = min_of(block_keys_, visible_keys(bounds_, row0 + rows - 1) - key0);
    for_each_run(kinds, first_key, keys_end,
                 [&](int64_t first, int64_t last, bool mixed) { attend_run(row0, rows, held, key0, first, last - first, mixed); });
  }

  // The same for keys [first, first + keys) of the block.
  void attend_run(int64_t row0, int64_t rows, int64_t held, int64_t key0, int64_t first, int64_t keys, bool mixed) {
    const int64_t keys_padded = round_up(keys, 32), rows_padded = round_up(rows, 16);
    const auto tick = [this] { prefetcher_.tick(); };
    // S (rows, keys) = Q K^T
    tile_matmul<Tiles, Storage>(rows_padded, keys_padded, dim_qk_, {packed_query_ + held * dim_qk_, dim_qk_},
                                {packed_key_ + first * dim_qk_, dim_qk_ / 32, 1}, scores_, score_stride_, false, tick);
    if (dropping_)
      dropout_keep_bits(problem_, batch_ * problem_.num_heads + head_, row0, rows, key0 + first, keys_padded / 16, keep_bits_,
                        block_keys_ / 16);
    uint8_t& started = started_[held / kRows];
    const bool biased = softcap_ || score_bias_.needed_beyond_absent_keys(mixed);
    bool filled = false;
    for (int64_t i = 0; i < rows; i += 16) {
      const RowGroup group = row_group(row0, rows, i, held, key0 + first, keys, started != 0);
      if (biased) {
        const __m512 block_max = add_bias_and_reduce_max(group, mixed, filled);
        softmax<false>(group, block_max, true);
      } else if (has_holes_) {
        softmax<true>(group, reduce_max<true>(group), false);
      } else {
        softmax<false>(group, reduce_max<false>(group), false);
      }
    }
    // acc (rows, dim_v) += P V
    tile_matmul<Tiles, Storage>(rows_padded, dim_v_, keys_padded, {weights_, weight_stride_},
                                {packed_value_ + first * dim_v_, 1, dim_v_ / 16}, acc_ + held * dim_v_, dim_v_, started != 0, tick);
    started = 1;
  }

  // 16 rows of a score block.
  struct RowGroup {
    int64_t row0, live;         // query rows [row0, row0 + live); the other rows of the group repeat the last one's mask
    int64_t held;               // first row of their statistics and accumulators
    int64_t first;              // first row of their scores and weights
    int64_t key0, keys_padded;  // the block's keys
    bool started;               // whether acc holds something
    int64_t visible[16];        // how many keys each row sees, counting holes
    int64_t row(int64_t i) const { return row0 + min_of(i, live - 1); }
  };

  RowGroup row_group(int64_t row0, int64_t rows, int64_t first, int64_t held, int64_t key0, int64_t keys, bool started) const {
    RowGroup group{row0 + first, min_of(int64_t{16}, rows - first), held + first, first, key0, round_up(keys, 32), started, {}};
    for (int64_t i = 0; i < 16; ++i) group.visible[i] = max_of(int64_t{0}, min_of(keys, visible_keys(bounds_, group.row(i)) - key0));
    return group;
  }

  // Which of keys [j, j + 16) of the block row i sees.
  template <bool kCheckHoles>
  __attribute__((always_inline)) __mmask16 seen_lanes(const RowGroup& group, int64_t i, int64_t j) const {
    const __mmask16 lanes = first_lanes(group.visible[i] - j);
    return kCheckHoles && has_holes_ ? static_cast<__mmask16>(lanes & present_bits_[(group.key0 + j) / 16]) : lanes;
  }

  // Online softmax over one block of keys: updates the statistics, stores bf16 weights and rescales acc to the new maximum. block_max: the
  // row maxima of the products, or of the scores if `scaled`.
  template <bool kCheckHoles>
  void softmax(const RowGroup& group, __m512 block_max, bool scaled) {
    const __m512 minus_infinity = _mm512_set1_ps(-kInfinity), old_max = _mm512_load_ps(row_max_ + group.held);
    if (!scaled) block_max = _mm512_mul_ps(block_max, _mm512_set1_ps(score_scale_));
    const __m512 new_max = _mm512_max_ps(old_max, block_max);
    // A row that has seen nothing yet is shifted by 0, so its exponents stay -inf instead of becoming -inf + inf.
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(new_max, minus_infinity, _CMP_NEQ_UQ), new_max);
    const __m512 alpha = exp2_masked<kDegree>(_mm512_sub_ps(old_max, shift), 0xffff);
    scaled = scaled || scale_large_scores(group, shift);
    const BlockSums block = store_weights<kCheckHoles>(group, scaled ? 1.0f : score_scale_, shift);
    float *row_sum = row_sum_ + group.held, *weight_sum = weight_sum_ + group.held;
    _mm512_store_ps(row_max_ + group.held, new_max);
    _mm512_store_ps(row_sum, _mm512_fmadd_ps(_mm512_load_ps(row_sum), alpha, block.exact));
    _mm512_store_ps(weight_sum, _mm512_fmadd_ps(_mm512_load_ps(weight_sum), alpha, block.rounded));
    if (group.started) scale_accumulators(group.held, alpha);
  }

  template <bool kCheckHoles>
  __m512 reduce_max(const RowGroup& group) const {
    __m512 maxima[16];
    for (int64_t i = 0; i < 16; ++i) {
      const float* row = scores_ + (group.first + i) * score_stride_;
      __m512 max0 = _mm512_set1_ps(-kInfinity), max1 = max0;
      int64_t j = 0;
      if constexpr (!kCheckHoles)
        for (; j + 32 <= group.visible[i]; j += 32) {
          max0 = _mm512_max_ps(max0, _mm512_load_ps(row + j));
          max1 = _mm512_max_ps(max1, _mm512_load_ps(row + j + 16));
        }
      for (; j < group.visible[i]; j += 16)
        max0 = _mm512_mask_max_ps(max0, seen_lanes<kCheckHoles>(group, i, j), max0, _mm512_load_ps(row + j));
      maxima[i] = _mm512_max_ps(max0, max1);
    }
    return reduce_16_vectors(maxima, Max{});
  }

  // Scales the scores to log2 units if any row's are large; see kScaleFirstAbove.
  bool scale_large_scores(const RowGroup& group, __m512 row_max) {
    if (!_mm512_cmp_ps_mask(_mm512_abs_ps(row_max), _mm512_set1_ps(kScaleFirstAbove), _CMP_GT_OQ)) return false;
    for (int64_t i = 0; i < 16; ++i) {
      float* row = scores_ + (group.first + i) * score_stride_;
      for (int64_t j = 0; j < group.visible[i]; j += 16)
        _mm512_store_ps(row + j, _mm512_mul_ps(_mm512_load_ps(row + j), _mm512_set1_ps(score_scale_)));
    }
    return true;
  }

  // Turns the products into scores in log2 units, with soft cap and bias, -inf for masked keys. filled: bias_ holds the row that all share.
  __m512 add_bias_and_reduce_max(const RowGroup& group, bool mixed, bool& filled) {
    const bool same = score_bias_.same_for_all_rows(mixed);
    Vec maxima[16];
    for (int64_t i = 0; i < 16; ++i) {
      float* row = scores_ + (group.first + i) * score_stride_;
      const MaskRow mask = same ? MaskRow{} : score_bias_.mask_row(group.row(i), group.key0, mixed);
      if (!filled && !mask) score_bias_.fill(group.row(i), group.key0, group.visible[i], mixed, bias_);
      filled = same;
      const int64_t visible = group.visible[i];
      maxima[i] = with_bias(score_bias_, mask, bias_, visible, 1, [&](auto added) FA_LAMBDA_INLINE {
        Vec highest = broadcast(-kInfinity);
        for (int64_t j = 0; j < visible; j += 16) {
          const Vec bias = select(first_lanes(visible - j), added(j), broadcast(-kInfinity));
          const Vec x = mul(biased_scores(load(row + j), problem_.softmax_scale, softcap_, bias), broadcast(kLog2e));
          store(row + j, x);
          highest = max_of(highest, x);
        }
        return highest;
      });
    }
    return reduce_16_vectors(&maxima[0].x, Max{});
  }

  struct BlockSums {  // of the weights of 16 rows, before dropout
    __m512 exact, rounded;
  };

  // weights = keep * 2^(scale * score - shift) as bf16 or in parts, 0 for unseen keys. Returns their sums; parts lose nothing that matters.
  template <bool kCheckHoles>
  BlockSums store_weights(const RowGroup& group, float scale_of_scores, __m512 shift) {
    alignas(64) float row_shift[16];
    _mm512_store_ps(row_shift, shift);
    const __m512 scale = _mm512_set1_ps(scale_of_scores);
    [[maybe_unused]] const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    __m512 sums[16], rounded_sums[16];
    for (int64_t i = 0; i < 16; ++i) {
      const float* row = scores_ + (group.first + i) * score_stride_;
      const Parts weight = weights_ + (group.first + i) * weight_stride_;
      const uint16_t* keep = dropping_ ? keep_bits_ + (group.first + i) * (block_keys_ / 16) : nullptr;
      const __m512 minus_shift = _mm512_set1_ps(-row_shift[i]);
      __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, rounded_sum = sum0;
      const auto store_32 = [&](int64_t j, __mmask16 seen0, __mmask16 seen1) __attribute__((always_inline)) {
        const __m512 p0 = exp2_masked<kDegree>(_mm512_fmadd_ps(_mm512_load_ps(row + j), scale, minus_shift), seen0);
        const __m512 p1 = exp2_masked<kDegree>(_mm512_fmadd_ps(_mm512_load_ps(row + j + 16), scale, minus_shift), seen1);
        sum0 = _mm512_add_ps(sum0, p0);
        sum1 = _mm512_add_ps(sum1, p1);
        const __m512i rounded = narrow(p0, p1);
        if constexpr (Storage::kParts == 1) rounded_sum = _mm512_dpbf16_ps(rounded_sum, reinterpret_cast<__m512bh>(rounded), ones);
        const auto store_part = [&](int part, __m512i both) __attribute__((always_inline)) {
          if (keep) both = _mm512_maskz_mov_epi16(keep[j / 16] | static_cast<uint32_t>(keep[j / 16 + 1]) << 16, both);
          _mm512_store_si512(weight.at(part) + j, both);
        };
        store_part(0, rounded);
        if constexpr (Storage::kParts == 2) store_part(1, narrowing_error(p0, p1, rounded));
      };
      int64_t j = 0;
      if constexpr (!kCheckHoles)
        for (; j + 32 <= group.visible[i]; j += 32) store_32(j, 0xffff, 0xffff);
      for (; j < group.visible[i]; j += 32) store_32(j, seen_lanes<kCheckHoles>(group, i, j), seen_lanes<kCheckHoles>(group, i, j + 16));
      for (; j < group.keys_padded; j += 32)
        for (int part = 0; part < Storage::kParts; ++part) _mm512_store_si512(weight.at(part) + j, _mm512_setzero_si512());
      sums[i] = _mm512_add_ps(sum0, sum1), rounded_sums[i] = Storage::kParts == 1 ? rounded_sum : sums[i];
    }
    return {reduce_16_vectors(sums, Sum{}), reduce_16_vectors(rounded_sums, Sum{})};
  }

  void scale_accumulators(int64_t held, __m512 alpha) {
    alignas(64) float factor[16];
    _mm512_store_ps(factor, alpha);
    for (int64_t i = 0; i < 16; ++i) {
      if (factor[i] == 1.0f) continue;
      float* row = acc_ + (held + i) * dim_v_;
      for (int64_t d = 0; d < dim_v_; d += 16) _mm512_store_ps(row + d, _mm512_mul_ps(_mm512_load_ps(row + d), _mm512_set1_ps(factor[i])));
    }
  }

  // Stores out = acc / row_sum and lse of query rows [row0, row0 + rows).
  void store_rows(int64_t row0, int64_t rows, int64_t held) {
    for (int64_t i = 0; i < rows; i += 16) {
      const __m512 sum = _mm512_load_ps(row_sum_ + held + i);
      const __mmask16 nonempty = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 lse = _mm512_fmadd_ps(_mm512_load_ps(row_max_ + held + i), _mm512_set1_ps(kLn2), natural_log(sum));
      _mm512_mask_storeu_ps(lse_row(row0 + i), first_lanes(rows - i), _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), nonempty, lse));
      alignas(64) float inverse[16];
      _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(problem_.dropout_scale()), _mm512_load_ps(weight_sum_ + held + i)));
      // The other rows are set to 0 by selection, not multiplication.
      const int written = problem_.dropout_threshold < 65536 && started_[held / kRows] ? nonempty : 0;
      for (int64_t r = 0; r < min_of(int64_t{16}, rows - i); ++r) {
        const float* from = acc_ + (held + i + r) * dim_v_;
        Element *to = out_row(row0 + i + r), *error = out_error_row(row0 + i + r);
        const __m512 factor = _mm512_set1_ps(inverse[r]);
        const __mmask16 select = written >> r & 1 ? 0xffff : 0;
        for (int64_t d = 0; d < problem_.head_dim_v; d += 32) {
          const __mmask32 lanes = first_lanes32(problem_.head_dim_v - d);
          const __m512 first = _mm512_maskz_mul_ps(select, _mm512_load_ps(from + d), factor),
                       second = _mm512_maskz_mul_ps(select, _mm512_load_ps(from + d + 16), factor);
          Storage::store(to + d, lanes, first, second);
          if constexpr (Storage::kParts == 1)
            if (error) _mm512_mask_storeu_epi16(error + d, lanes, narrowing_error(first, second, narrow(first, second)));
        }
      }
    }
  }

  void store_absent_rows(int64_t row0, int64_t rows) {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      store_zero_row(out_row(row), problem_.head_dim_v);
      if (Element* error = out_error_row(row)) store_zero_row(error, problem_.head_dim_v);
      *lse_row(row) = -kInfinity;
    }
  }

  // A row of query head batch_head.
  const Element* query_row_of(const StridedTensor& tensor, int64_t batch_head, int64_t row) const {
    const int64_t batch = batch_head / problem_.num_heads;
    return row_ptr<const Element>(tensor, batch, batch_head % problem_.num_heads, first_query_of(problem_, batch) + row);
  }
  void prefetch_keys(const StridedTensor& tensor, int64_t batch_head, int64_t key, int64_t keys, int64_t head_dim) {
    const int64_t batch = batch_head / problem_.num_heads, head = key_head(problem_, batch_head % problem_.num_heads);
    prefetcher_.add_reads(row_ptr<const Element>(tensor, batch, head, first_key_of(problem_, batch) + key), tensor.row * kBytes, keys,
                          head_dim * kBytes);
  }

  // Spreads prefetches for later steps over the ticks of this one: the next query rows and their output, and a share of the next keys and
  // values.
  void plan_prefetch(int64_t task, int64_t last_task, int64_t row0, int64_t rows, int64_t key0) {
    prefetcher_.clear();
    const int64_t task_row0 = task % tasks_per_head_ * rows_per_task_, task_rows = min_of(rows_per_task_, problem_.seqlen_q - task_row0);
    const int64_t batch_head = task / tasks_per_head_;
    int64_t next_row = row0 + rows, next_head = batch_head;
    if (next_row >= task_row0 + task_rows) {
      if (task + 1 < last_task)
        next_head = (task + 1) / tasks_per_head_, next_row = (task + 1) % tasks_per_head_ * rows_per_task_;
      else
        next_row = problem_.seqlen_q;
    }
    if (key0 == 0 && next_row < problem_.seqlen_q) {
      const int64_t next_rows = min_of(kRows, problem_.seqlen_q - next_row);
      prefetcher_.add_reads(query_row_of(problem_.query, next_head, next_row), problem_.query.row * kBytes, next_rows,
                            problem_.head_dim_qk * kBytes);
      const auto writes = [&](const StridedTensor& result) {
        if (result.data)
          prefetcher_.add_writes(query_row_of(result, next_head, next_row), result.row * kBytes, next_rows, problem_.head_dim_v * kBytes);
      };
      writes(problem_.out), writes(problem_.out_error);
    }
    // Keys: the next block of this head, or the first one of the next head, in equal shares over the rows before it.
    int64_t next_keys = batch_head, next_key = key0 + block_keys_, first = row0 - task_row0, span = task_rows;
    if (single_block_ || next_key >= bounds_.seqlen_k) {
      next_keys = batch_head + 1, next_key = 0;
      if (single_block_) first = row0, span = problem_.seqlen_q;
    }
    if (next_keys * tasks_per_head_ < last_task) {
      const int64_t keys = min_of(block_keys_, problem_.seqlen_k - next_key);
      const int64_t from = keys * first / span, to = keys * min_of(first + kRows, span) / span;
      prefetch_keys(problem_.key, next_keys, next_key + from, to - from, problem_.head_dim_qk);
      prefetch_keys(problem_.value, next_keys, next_key + from, to - from, problem_.head_dim_v);
    }
    const int64_t keys = min_of(block_keys_, bounds_.seqlen_k - key0);
    prefetcher_.spread_over(divide_up(keys, 32) + dim_v_ / 32);
  }

  const AttentionProblem& problem_;
  const int64_t rows_per_task_, tasks_per_head_, dim_qk_, dim_v_, block_keys_;
  const bool single_block_;  // whether one packed block holds all keys of a head
  const int64_t held_rows_;  // rows whose accumulators are held at once
  const int64_t score_stride_, weight_stride_;
  const bool dropping_;
  const float score_scale_;  // from products to log2 units
  const Softcap softcap_;
  ScoreBias score_bias_;

  Parts packed_key_, packed_value_, packed_query_, weights_;
  float *acc_ = nullptr, *row_max_ = nullptr, *row_sum_ = nullptr, *weight_sum_ = nullptr, *scores_ = nullptr;
  uint16_t *keep_bits_ = nullptr, *present_bits_ = nullptr;
  float *key_bias_ = nullptr, *bias_ = nullptr;  // (seqlen_k,) 0 or -inf; (block_keys,) for one row, or shared by all
  uint8_t* started_ = nullptr;                   // per 32 held rows: whether acc_ holds something
  uint8_t* tile_kinds_ = nullptr;                // (rows_per_task / 64, tiles)

  int64_t batch_ = -1, head_ = 0, kv_head_ = 0, packed_head_ = -1;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

}  // namespace fused_attention::cpu::FA_ISA
