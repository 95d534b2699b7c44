// SPDX-License-Identifier: Apache-2.0
// Backward on bf16 tiles, multiplied by Tiles (AmxTiles or DotProductTiles), of bfloat16 numbers or of float32 numbers in two parts, as
// Storage says. A task is the query heads of one key head, or a part of its
// keys. Everything of score size is transposed, keys x queries: P^T and dS^T come out of the softmax as the A operands of dV and dK, an
// interleaved copy of dS^T is the B operand of dQ^T, and lse and delta are vectors along the lanes. For each block of keys and each block
// of query rows that sees it:
//
//   1. S^T = K Q^T,   dP^T = V dO^T                           P = exp(scale S + bias - lse), bias and soft cap: bf16_bias.h
//   2. dS = P * (keep * dropout_scale * dP - delta)           delta = rowsum(dO * (O + out_error)) - dlse
//   3. dV += (keep * P)^T dO,   dK += dS^T Q,   dQ^T += K^T dS^T
//
// Q and dO are packed once per head in both B layouts, K and V once per block of keys. (Dao 2023, algorithm 2, with the loop over keys
// outside.)
#pragma once
#include "bf16_bias.h"
#include "backward_tasks.h"
#include "dropout.h"
#include "kernel_table.h"

namespace fused_attention::cpu::FA_ISA {

template <class Tiles, class Storage = Bf16Storage>
class Bf16Backward {
 public:
  static Plan plan(const AttentionProblem& problem, int num_threads) {
    if (is_widened(problem)) return widened().plan(problem, num_threads);
    Plan plan{BackwardTasks(problem).count(), problem.seqlen_q, Bf16Backward(problem).carve(nullptr)};
    if (!Tiles::kAnySize) {
      const size_t other_bytes = widened().plan(problem, num_threads).scratch_bytes;
      if (other_bytes > plan.scratch_bytes) plan.scratch_bytes = other_bytes;
    }
    return plan;
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    if (is_widened(problem)) return widened().run(problem, plan, first_task, last_task, scratch);
    if (first_task >= last_task) return;
    Bf16Backward backward(problem);
    backward.carve(scratch);
    [[maybe_unused]] const Tiles tiles;
    for (int64_t task = first_task, end; task < last_task; task = end) {
      for (end = task; end < last_task && backward.is_widened(end);) ++end;
      if (end > task) {
        widened().run(problem, plan, task, end, scratch);
        backward.batch_ = -1;  // what it held in scratch is gone
        continue;
      }
      end = task + 1;
      backward.tasks_.for_each_head(
          task, [&](int64_t b, int64_t h_kv, bool more) { backward.run_key_head(task, b, h_kv, more || end < last_task); });
    }
  }

 private:
  using Element = typename Storage::Element;
  static constexpr int64_t kBytes = sizeof(Element);

  static const Kernel& widened() { return kAvx512Kernels.backward[static_cast<int>(Storage::kDtype)]; }

  // Whether a problem is left to the float32 kernels. Those of few rows are as a whole, because a task of theirs covers several heads.
  static bool is_widened(const AttentionProblem& problem) {
    return !Tiles::pay(problem) || (!Tiles::kAnySize && !problem.dattn_mask && problem.seqlen_q <= kFewRows);
  }

  // Whether a task is left to the float32 kernels, by the lengths of its sequence. It may have several if the mask needs a gradient.
  bool is_widened(int64_t task) const {
    if (Tiles::kAnySize || problem_.dattn_mask) return false;
    bool is_widened = false;
    tasks_.for_each_head(task, [&](int64_t b, int64_t, bool) { is_widened = !Tiles::pay(problem_, sequence_bounds(problem_, b)); });
    return is_widened;
  }

  static constexpr int64_t kRows = kBlockRows, kKeys = kBlockColumns;

  explicit Bf16Backward(const AttentionProblem& problem)
      : problem_(problem),
        tasks_(problem),
        bias_(problem),
        group_(problem.num_heads / max_of(problem.num_heads_kv, int64_t{1})),
        held_keys_(group_ > 1 ? tasks_.most_keys() : kKeys),
        dim_qk_(round_up(problem.head_dim_qk, 32)),
        dim_v_(round_up(problem.head_dim_v, 32)),
        rows_capacity_(round_up(problem.seqlen_q, 32)),
        dquery_stride_(rows_capacity_ + 16),
        score_scale_(problem.softmax_scale * kLog2e),
        dropping_(problem.dropout_threshold > 0),
        sparse_(problem.window_left < kUnlimited || problem.row_tiles.data) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 16; ++i) index[2 * i] = static_cast<uint16_t>(i), index[2 * i + 1] = static_cast<uint16_t>(16 + i);
    pair_lanes_ = _mm512_load_si512(index);
  }

  size_t carve(char* memory) {
    Arena arena(memory);
    query_tiles_ = take_parts<Storage>(arena, rows_capacity_ * dim_qk_);
    query_pairs_ = take_parts<Storage>(arena, rows_capacity_ * dim_qk_);
    dout_tiles_ = take_parts<Storage>(arena, rows_capacity_ * dim_v_);
    dout_pairs_ = take_parts<Storage>(arena, rows_capacity_ * dim_v_);
    dquery_sum_t_ = arena.take<float>(dim_qk_ * dquery_stride_);
    dquery_part_t_ = arena.take<float>(problem_.num_key_parts > 1 ? dim_qk_ * dquery_stride_ : 0);
    lse_log2_ = arena.take<float>(rows_capacity_);
    delta_ = arena.take<float>(rows_capacity_);
    seeing_bits_ = arena.take<uint16_t>(rows_capacity_ / 16);
    key_rows_ = take_parts<Storage>(arena, kKeys * dim_qk_);
    key_t_ = take_parts<Storage>(arena, dim_qk_ * kKeyStride);
    value_rows_ = take_parts<Storage>(arena, kKeys * dim_v_);
    dkey_ = arena.take<float>(held_keys_ * dim_qk_);
    dvalue_ = arena.take<float>(held_keys_ * dim_v_);
    keys_started_ = arena.take<uint8_t>(held_keys_ / kKeys);
    scores_ = arena.take<float>(kKeys * kScoreStride);
    dweights_ = arena.take<float>(kKeys * kScoreStride);
    weights_ = take_parts<Storage>(arena, kKeys * kWeightStride);
    dscores_ = take_parts<Storage>(arena, kKeys * kWeightStride);
    dscore_pairs_ = take_parts<Storage>(arena, kKeys * kRows);
    if (dropping_) keep_bits_ = arena.take<uint16_t>(kKeys * kRows / 16);
    if (problem_.key_mask) present_bits_ = arena.take<uint16_t>(round_up(problem_.seqlen_k, 32) / 16);
    if (problem_.key_mask) key_bias_ = arena.take<float>(round_up(problem_.seqlen_k, 16) + 16);
    if (bias_.needed(problem_.row_tiles.data)) bias_.carve(arena);
    if (problem_.row_tiles.data) {
      tile_kinds_ = arena.take<uint8_t>(divide_up(problem_.seqlen_q, 64) * problem_.row_tiles.num_tiles);
      column_kinds_ = arena.take<uint8_t>(divide_up(problem_.seqlen_q, 64));
    }
    return arena.used();
  }

  void run_key_head(int64_t task, int64_t b, int64_t h_kv, bool more) {
    set_batch(b);
    kv_head_ = h_kv;
    const Range parts = tasks_.parts(task, bounds_.seqlen_k), all_keys = tasks_.keys(parts, bounds_.seqlen_k);
    if (parts.first == parts.last) return;
    for (int64_t n = 0; n < held_keys_ / kKeys; ++n) keys_started_[n] = 0;
    for (int64_t h = h_kv * group_; h < (h_kv + 1) * group_; ++h) {
      const bool last_head = h + 1 == (h_kv + 1) * group_;
      set_head(h);
      pack_query_side();
      plan_prefetch(!last_head || more);
      first_row_ = first_row_of(all_keys);
      for (int64_t part = parts.first; part < parts.last; ++part) {
        const Range range = tasks_.keys({part, part + 1}, bounds_.seqlen_k);
        start_part(task, part, part == parts.first);
        for (int64_t key0 = range.first; key0 < range.last; key0 += kKeys)
          run_key_block(key0, min_of(kKeys, range.last - key0), key0 > range.first || sparse_, key0 - all_keys.first, last_head);
        if (part > parts.first) add_part(first_row_of(range));
        store_head_gradients(problem_, bounds_, batch_, head_, part, delta_, static_cast<float>(-bias_.slope_sum()));
      }
      if (problem_.dquery_parts)
        store_dquery_part(tasks_.dquery_part(parts.first, bounds_, batch_, head_));
      else
        store_dquery();
    }
    if (all_keys.last < bounds_.seqlen_k) return;
    for (int64_t key = bounds_.seqlen_k; key < bounds_.keys; ++key) {
      store_zero_row(key_row(problem_.dkey, key), problem_.head_dim_qk);
      store_zero_row(key_row(problem_.dvalue, key), problem_.head_dim_v);
    }
  }

  Element* query_row(const StridedTensor& tensor, int64_t row) const {
    return row_ptr<Element>(tensor, batch_, head_, bounds_.first_query + row);
  }
  Element* key_row(const StridedTensor& tensor, int64_t key) const {
    return row_ptr<Element>(tensor, batch_, kv_head_, bounds_.first_key + key);
  }
  RowSource<Storage> query_rows(const StridedTensor& tensor, int64_t head_dim, const uint16_t* seeing_bits) const {
    return rows_of<Storage>(tensor, batch_, head_, bounds_.first_query, bounds_.seqlen_q, head_dim, seeing_bits);
  }
  RowSource<Storage> key_rows(const StridedTensor& tensor, int64_t key0, int64_t keys, int64_t head_dim) const {
    return rows_of<Storage>(tensor, batch_, kv_head_, bounds_.first_key + key0, keys, head_dim,
                            has_holes_ ? present_bits_ + key0 / 16 : nullptr);
  }

  void set_batch(int64_t batch) {
    if (batch_ == batch) return;
    batch_ = batch;
    bounds_ = sequence_bounds(problem_, batch_);
    rows_padded_ = round_up(bounds_.seqlen_q, 32);
    if (!problem_.key_mask) return;
    has_holes_ = fill_present_bits(problem_, batch_, bounds_.seqlen_k, present_bits_);
    fill_key_bias(problem_, batch_, bounds_.seqlen_k, key_bias_, round_up(bounds_.seqlen_k, 16) + 16);
  }

  // Rows before the first one that sees one of the keys get no gradient from them. If other rows may see none either, dQ starts at zero.
  int64_t first_row_of(Range keys) const {
    if (sparse_) return 0;
    return keys.first < keys.last ? min_of(first_row_seeing(bounds_, keys.first) / 32 * 32, rows_padded_) : rows_padded_;
  }

  // dQ from the first of a task's parts goes to the sum itself.
  void start_part(int64_t task, int64_t part, bool first) {
    float* dmask = tasks_.mask_gradient(task, part);
    if (dmask) dmask += batch_ * problem_.dattn_mask_batch + head_ * problem_.dattn_mask_head;
    bias_.enter(bounds_, batch_, head_, has_holes_ ? key_bias_ : nullptr, dmask);
    dquery_t_ = first ? dquery_sum_t_ : dquery_part_t_;
    for (int64_t i = 0; sparse_ && i < dim_qk_ * dquery_stride_; i += 16) store(dquery_t_ + i, broadcast(0.0f));
  }

  // Adds a part of dQ, which holds rows from first_row on, to the sum of those before it.
  void add_part(int64_t first_row) {
    for (int64_t d = 0; d < dim_qk_; ++d)
      for (int64_t at = d * dquery_stride_ + first_row; at < d * dquery_stride_ + rows_padded_; at += 16)
        _mm512_store_ps(dquery_sum_t_ + at, _mm512_add_ps(_mm512_load_ps(dquery_sum_t_ + at), _mm512_load_ps(dquery_part_t_ + at)));
  }

  void set_head(int64_t head) {
    head_ = head;
    for (int64_t block = 0; tile_kinds_ && block < divide_up(problem_.seqlen_q, 64); ++block)
      expand_tiles(problem_.row_tiles, batch_, head, block, tile_kinds_ + block * problem_.row_tiles.num_tiles);
  }

  void pack_query_side() {
    const float* lse_of_head = problem_.lse + lse_offset(problem_, bounds_, batch_, head_);
    const uint16_t* seeing_bits = fill_seeing_bits(lse_of_head) ? nullptr : seeing_bits_;
    const RowSource<Storage> query = query_rows(problem_.query, problem_.head_dim_qk, seeing_bits);
    const RowSource<Storage> dout = query_rows(problem_.dout, problem_.head_dim_v, seeing_bits);
    for (int part = 0; part < Storage::kParts; ++part) {
      pack_pairs_along_head_dim(query, part, rows_padded_, dim_qk_, query_tiles_.at(part));
      pack_pairs_along_sequence(query, part, rows_padded_, dim_qk_, query_pairs_.at(part));
      pack_pairs_along_head_dim(dout, part, rows_padded_, dim_v_, dout_tiles_.at(part));
      pack_pairs_along_sequence(dout, part, rows_padded_, dim_v_, dout_pairs_.at(part));
    }
    const bool has_error = problem_.out_error.data;
    const RowSource<Storage> out = query_rows(problem_.out, problem_.head_dim_v, nullptr),
                             out_error = has_error ? query_rows(problem_.out_error, problem_.head_dim_v, nullptr) : out;
    const float* dlse = problem_.dlse ? problem_.dlse + (lse_of_head - problem_.lse) : nullptr;
    for (int64_t row = 0; row < rows_padded_; row += 16) {
      const LaneMask live = first_lanes(bounds_.seqlen_q - row);
      __m512 products[16];
      for (int64_t i = 0; i < 16; ++i) {
        products[i] = add_products(dout, out, row + i, _mm512_setzero_ps());
        if (has_error) products[i] = add_products(dout, out_error, row + i, products[i]);
      }
      __m512 sums = reduce_16_vectors(products, Sum{});
      if (dlse) sums = _mm512_sub_ps(sums, _mm512_maskz_loadu_ps(live, dlse + row));
      _mm512_storeu_ps(delta_ + row, _mm512_maskz_mov_ps(live, sums));
      // Rows that are absent or see nothing get lse = +inf, which makes all their weights exactly 0.
      const __m512 lse = _mm512_maskz_loadu_ps(live, lse_of_head + row), infinity = _mm512_set1_ps(kInfinity);
      _mm512_storeu_ps(lse_log2_ + row, _mm512_mask_mul_ps(infinity, seeing_bits_[row / 16], lse, _mm512_set1_ps(kLog2e)));
    }
  }

  // Finds the present rows that see some key. The others get no gradient, and their query and dout, which may hold garbage, are read as
  // zeros. Returns true if all present rows see a key.
  bool fill_seeing_bits(const float* lse) {
    bool all = true;
    for (int64_t row = 0; row < rows_padded_; row += 16) {
      const LaneMask live = first_lanes(bounds_.seqlen_q - row);
      const LaneMask seeing =
          _mm512_mask_cmp_ps_mask(live, _mm512_maskz_loadu_ps(live, lse + row), _mm512_set1_ps(-kInfinity), _CMP_NEQ_UQ);
      seeing_bits_[row / 16] = seeing;
      all &= seeing == live;
    }
    return all;
  }

  // sum + left * right over one row; 16 lanes of partial sums.
  __m512 add_products(const RowSource<Storage>& left, const RowSource<Storage>& right, int64_t row, __m512 sum) const {
    if (!left.present(row)) return sum;
    for (int64_t d = 0; d < left.head_dim; d += 32)
      sum = Storage::add_products(left.at(row, d), right.at(row, d), first_lanes32(left.head_dim - d), sum);
    return sum;
  }

  // held: position of the block's dK and dV in dkey_ and dvalue_. add: add to dQ, which already holds earlier keys' contributions.
  void run_key_block(int64_t key0, int64_t keys, bool add, int64_t held, bool last_head) {
    if (group_ == 1) held = 0, keys_started_[0] = 0;
    const int64_t first_row = first_row_seeing(bounds_, key0),
                  end = min_of(round_up(rows_seeing(bounds_, key0 + keys - 1), 32), rows_padded_);
    for (int64_t tile = 0; column_kinds_ && tile < divide_up(problem_.seqlen_q, 64); ++tile)
      column_kinds_[tile] = tile_kinds_[tile * problem_.row_tiles.num_tiles + key0 / 64];
    bool packed = false;
    for_each_run(column_kinds_, column_kinds_ ? first_row / 64 * 64 : first_row / 32 * 32, end,
                 [&](int64_t begin, int64_t last, bool mixed) {
                   if (!packed) pack_keys(key0, keys), packed = true;
                   for (int64_t row0 = begin; row0 < last; row0 += kRows)
                     run_block(row0, min_of(kRows, last - row0), key0, keys, mixed, add, held);
                 });
    if (last_head) store_key_gradients(key0, keys, held);
  }

  void pack_keys(int64_t key0, int64_t keys) {
    const RowSource<Storage> key = key_rows(problem_.key, key0, keys, problem_.head_dim_qk),
                             value = key_rows(problem_.value, key0, keys, problem_.head_dim_v);
    for (int part = 0; part < Storage::kParts; ++part) {
      pack_rows(key, part, round_up(keys, 32), dim_qk_, key_rows_.at(part));
      pack_rows(value, part, round_up(keys, 32), dim_v_, value_rows_.at(part));
      pack_transposed_rows(key, part, round_up(keys, 32), dim_qk_, key_t_.at(part), kKeyStride);
    }
  }

  void run_block(int64_t row0, int64_t rows, int64_t key0, int64_t keys, bool mixed, bool add, int64_t held) {
    const int64_t keys_padded = round_up(keys, 32);
    const auto tick = [this] { prefetcher_.tick(); };
    // S^T (keys, rows) = K Q^T, dP^T = V dO^T
    tile_matmul<Tiles, Storage>(keys_padded, rows, dim_qk_, {key_rows_, dim_qk_}, {query_tiles_ + row0 * dim_qk_, dim_qk_ / 32, 1}, scores_,
                                kScoreStride, false, tick);
    tile_matmul<Tiles, Storage>(keys_padded, rows, dim_v_, {value_rows_, dim_v_}, {dout_tiles_ + row0 * dim_v_, dim_v_ / 32, 1}, dweights_,
                                kScoreStride, false, tick);
    if (dropping_)
      dropout_keep_bits_transposed<kRows>(problem_, batch_ * problem_.num_heads + head_, row0, rows, key0, keys_padded, keep_bits_,
                                          kRows / 16);
    if (bias_.needed(mixed)) {
      bias_.apply(row0, rows, key0, keys, mixed, scores_);
      gradient_of_softmax<kBiased>(row0, rows, key0, keys);
      if (bias_.wants_gradients()) bias_.add_gradients(row0, rows, key0, keys, dweights_);
    } else if (keys < keys_padded || has_holes_ || row0 < first_row_seeing(bounds_, key0 + keys - 1)) {
      gradient_of_softmax<kMasked>(row0, rows, key0, keys);
    } else {
      gradient_of_softmax<kAllSeen>(row0, rows, key0, keys);
    }
    // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
    uint8_t& started = keys_started_[held / kKeys];
    tile_matmul<Tiles, Storage>(keys_padded, dim_v_, rows, {weights_, kWeightStride}, {dout_pairs_ + row0 * dim_v_, 1, dim_v_ / 16},
                                dvalue_ + held * dim_v_, dim_v_, started != 0, tick);
    tile_matmul<Tiles, Storage>(keys_padded, dim_qk_, rows, {dscores_, kWeightStride}, {query_pairs_ + row0 * dim_qk_, 1, dim_qk_ / 16},
                                dkey_ + held * dim_qk_, dim_qk_, started != 0, tick);
    tile_matmul<Tiles, Storage>(dim_qk_, rows, keys_padded, {key_t_, kKeyStride}, {dscore_pairs_, 1, kRows / 16}, dquery_t_ + row0,
                                dquery_stride_, add, tick);
    started = 1;
  }

  void store_key_gradients(int64_t key0, int64_t keys, int64_t held) {
    const __m512 dkey_scale = _mm512_set1_ps(problem_.softmax_scale), dvalue_scale = _mm512_set1_ps(problem_.dropout_scale());
    for (int64_t j = 0; j < keys; ++j) {
      const bool written = keys_started_[held / kKeys] && key_present(key0 + j);
      store_row(key_row(problem_.dkey, key0 + j), dkey_ + (held + j) * dim_qk_, problem_.head_dim_qk, dkey_scale, written);
      store_row(key_row(problem_.dvalue, key0 + j), dvalue_ + (held + j) * dim_v_, problem_.head_dim_v, dvalue_scale, written);
    }
  }

  bool key_present(int64_t key) const { return key < bounds_.seqlen_k && (!has_holes_ || (present_bits_[key / 16] >> (key % 16) & 1)); }

  static void store_row(Element* to, const float* from, int64_t head_dim, __m512 scale, bool present) {
    if (!present) return store_zero_row(to, head_dim);
    for (int64_t d = 0; d < head_dim; d += 32)
      Storage::store(to + d, first_lanes32(head_dim - d), _mm512_mul_ps(_mm512_load_ps(from + d), scale),
                     _mm512_mul_ps(_mm512_load_ps(from + d + 16), scale));
  }

  // Lanes i with row0 + i >= first, the first row that sees the key.
  static __attribute__((always_inline)) __mmask16 lanes_from(int64_t first, int64_t row0) {
    return first <= row0 ? 0xffff : first >= row0 + 16 ? 0 : static_cast<__mmask16>(0xffffu << (first - row0));
  }

  enum Scores { kAllSeen, kMasked, kBiased };  // biased: scores are in log2 units, -inf for masked pairs

  template <Scores kScores>
  void gradient_of_softmax(int64_t row0, int64_t rows, int64_t key0, int64_t keys) {
    dropping_ ? softmax_gradient<kScores, true>(row0, rows, key0, keys) : softmax_gradient<kScores, false>(row0, rows, key0, keys);
  }

  // Computes P^T and dS^T of the block, as bf16 or in parts, from S^T and dP^T, two keys at a time, so that dS^T can also be stored as
  // interleaved pairs.
  template <Scores kScores, bool kDropping>
  void softmax_gradient(int64_t row0, int64_t rows, int64_t key0, int64_t keys) {
    constexpr int64_t kNever = INT64_MAX / 2;
    constexpr int kDegree = Storage::kParts == 2 ? 5 : kScores == kBiased ? 4 : 3;  // gradients of mask and slopes are float32
    const __m512 scale = _mm512_set1_ps(kScores == kBiased ? 1.0f : score_scale_), dropout_scale = _mm512_set1_ps(problem_.dropout_scale());
    const bool keeps_dscores = kScores == kBiased && bias_.wants_gradients();
    const float* derivative = kScores == kBiased && bias_.has_softcap() ? bias_.softcap_derivative() : nullptr;
    const auto first_row = [&](int64_t key) { return key_present(key) ? first_row_seeing(bounds_, key) : kNever; };
    for (int64_t j = 0; j < round_up(keys, 32); j += 2) {
      const int64_t first0 = kScores == kMasked ? first_row(key0 + j) : 0, first1 = kScores == kMasked ? first_row(key0 + j + 1) : 0;
      const Parts pairs = dscore_pairs_ + (j / 32) * (kRows / 16) * kTileElements + (j % 32 / 2) * 32;
      for (int64_t i = 0; i < rows; i += 16) {
        const __m512 lse = _mm512_load_ps(lse_log2_ + row0 + i), row_delta = _mm512_load_ps(delta_ + row0 + i);
        const int64_t at0 = j * kScoreStride + i, at1 = at0 + kScoreStride;
        const __mmask16 visible0 = kScores == kMasked ? lanes_from(first0, row0 + i) : 0xffff,
                        visible1 = kScores == kMasked ? lanes_from(first1, row0 + i) : 0xffff;
        __mmask16 nonzero0, nonzero1;
        __m512 p0 = exp2_masked<kDegree>(_mm512_fmsub_ps(_mm512_load_ps(scores_ + at0), scale, lse), visible0, &nonzero0);
        __m512 p1 = exp2_masked<kDegree>(_mm512_fmsub_ps(_mm512_load_ps(scores_ + at1), scale, lse), visible1, &nonzero1);
        __m512 dp0 = _mm512_load_ps(dweights_ + at0), dp1 = _mm512_load_ps(dweights_ + at1);
        __mmask32 kept = 0xffffffffu;
        if constexpr (kDropping) {
          const __mmask16 keep0 = keep_bits_[j * (kRows / 16) + i / 16], keep1 = keep_bits_[(j + 1) * (kRows / 16) + i / 16];
          kept = keep0 | static_cast<__mmask32>(keep1) << 16;
          dp0 = _mm512_maskz_mul_ps(keep0, dp0, dropout_scale);
          dp1 = _mm512_maskz_mul_ps(keep1, dp1, dropout_scale);
        }
        // Selected, not multiplied: dP may be infinite or NaN where P is 0.
        __m512 ds0 = _mm512_maskz_mul_ps(nonzero0, p0, _mm512_sub_ps(dp0, row_delta));
        __m512 ds1 = _mm512_maskz_mul_ps(nonzero1, p1, _mm512_sub_ps(dp1, row_delta));
        if (keeps_dscores) _mm512_store_ps(dweights_ + at0, ds0), _mm512_store_ps(dweights_ + at1, ds1);
        if (derivative)
          ds0 = _mm512_mul_ps(ds0, _mm512_load_ps(derivative + at0)), ds1 = _mm512_mul_ps(ds1, _mm512_load_ps(derivative + at1));
        __m512i both_p = narrow(p0, p1), both_ds = narrow(ds0, ds1);
        const auto store_part = [&](int part) __attribute__((always_inline)) {
          store_halves(weights_.at(part) + j * kWeightStride + i, kDropping ? _mm512_maskz_mov_epi16(kept, both_p) : both_p);
          store_halves(dscores_.at(part) + j * kWeightStride + i, both_ds);
          _mm512_store_si512(pairs.at(part) + i / 16 * kTileElements, _mm512_permutexvar_epi16(pair_lanes_, both_ds));
        };
        store_part(0);
        if constexpr (Storage::kParts == 2) {
          both_p = narrowing_error(p0, p1, both_p), both_ds = narrowing_error(ds0, ds1, both_ds);
          store_part(1);
        }
      }
    }
  }

  static __attribute__((always_inline)) void store_halves(Bf16Bits* row, __m512i both) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + kWeightStride), _mm512_extracti64x4_epi64(both, 1));
  }

  // Rows [row, row + 16) and columns [d, d + 16) of scale * dQ.
  FA_MEMBER_INLINE void load_dquery(int64_t row, int64_t d, __m512 scale, __m512i rows[16]) const {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      rows[i] = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_load_ps(dquery_sum_t_ + (d + i) * dquery_stride_ + row)));
    transpose16(rows);
  }

  void store_dquery() {
    const __m512 scale = _mm512_set1_ps(problem_.softmax_scale);
    for (int64_t row = 0; row < bounds_.rows; ++row)
      if (row < first_row_ || row >= bounds_.seqlen_q) store_zero_row(query_row(problem_.dquery, row), problem_.head_dim_qk);
    for (int64_t row = first_row_; row < bounds_.seqlen_q; row += 16) {
      const int64_t rows = min_of(bounds_.seqlen_q - row, int64_t{16});
      for (int64_t d = 0; d < problem_.head_dim_qk; d += 32) {
        __m512i low[16], high[16];
        load_dquery(row, d, scale, low);
        load_dquery(row, d + 16, scale, high);
        Element* to = query_row(problem_.dquery, row) + d;
        const __mmask32 lanes = first_lanes32(problem_.head_dim_qk - d);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (i < rows) Storage::store(to + i * problem_.dquery.row, lanes, _mm512_castsi512_ps(low[i]), _mm512_castsi512_ps(high[i]));
      }
    }
  }

  // Stores the part of dQ that this task computes, not yet scaled. part: (rows, head_dim_qk), zeroed by the caller.
  void store_dquery_part(float* part) const {
    for (int64_t row = first_row_; row < bounds_.seqlen_q; row += 16) {
      const int64_t rows = min_of(bounds_.seqlen_q - row, int64_t{16});
      for (int64_t d = 0; d < problem_.head_dim_qk; d += 16) {
        __m512i values[16];
        load_dquery(row, d, _mm512_set1_ps(1.0f), values);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (i < rows)
            _mm512_mask_storeu_ps(part + (row + i) * problem_.head_dim_qk + d, first_lanes(problem_.head_dim_qk - d),
                                  _mm512_castsi512_ps(values[i]));
      }
    }
  }

  // Prefetches this head's gradients and the next head's inputs during this head's matmuls.
  void plan_prefetch(bool more) {
    prefetcher_.clear();
    const auto writes = [&](const StridedTensor& tensor, const Element* row, int64_t rows, int64_t head_dim) {
      prefetcher_.add_writes(row, tensor.row * kBytes, rows, head_dim * kBytes);
    };
    writes(problem_.dkey, key_row(problem_.dkey, 0), bounds_.keys, problem_.head_dim_qk);
    writes(problem_.dvalue, key_row(problem_.dvalue, 0), bounds_.keys, problem_.head_dim_v);
    writes(problem_.dquery, query_row(problem_.dquery, 0), bounds_.rows, problem_.head_dim_qk);
    const int64_t next = batch_ * problem_.num_heads + head_ + 1;
    if (more) prefetch_inputs<Element>(problem_, next, prefetcher_);
    // 32 x 32 blocks of all five products; a causal mask needs about half of them.
    const int64_t row_tiles = rows_padded_ / 32, key_tiles = divide_up(bounds_.seqlen_k, 32);
    const int64_t ticks = 2 * row_tiles * key_tiles + divide_up(rows_padded_, kRows) * key_tiles * (dim_qk_ + dim_v_) / 32 +
                          divide_up(bounds_.seqlen_k, kKeys) * row_tiles * dim_qk_ / 32;
    prefetcher_.spread_over(is_causal(problem_) ? ticks / 2 : ticks);
  }

  static constexpr int64_t kWeightStride = kRows + 32, kKeyStride = kKeys + 32;

  const AttentionProblem& problem_;
  const BackwardTasks tasks_;
  TransposedBias bias_;
  const int64_t group_;      // query heads per key head
  const int64_t held_keys_;  // keys whose dK and dV are held at once: a block, or all of the task's if query heads share a key head
  const int64_t dim_qk_, dim_v_, rows_capacity_, dquery_stride_;
  const float score_scale_;  // from products to log2 units
  const bool dropping_;
  const bool sparse_;   // whether rows in the middle may see none of a task's keys
  __m512i pair_lanes_;  // {a0 .. a15, b0 .. b15} to {a0, b0, a1, b1, ...}

  Parts query_tiles_, query_pairs_, dout_tiles_, dout_pairs_;
  Parts key_rows_, key_t_, value_rows_, weights_, dscores_, dscore_pairs_;
  float *dquery_sum_t_ = nullptr, *dquery_part_t_ = nullptr;  // over the parts of the keys so far, and from one part
  float* dquery_t_ = nullptr;                                 // one of the two: what the current part's dQ goes to
  float *lse_log2_ = nullptr, *delta_ = nullptr, *dkey_ = nullptr, *dvalue_ = nullptr, *scores_ = nullptr, *dweights_ = nullptr;
  uint16_t *keep_bits_ = nullptr, *present_bits_ = nullptr, *seeing_bits_ = nullptr;
  float* key_bias_ = nullptr;                                // (seqlen_k,) 0 or -inf
  uint8_t* keys_started_ = nullptr;                          // per block of held keys: whether dkey_ and dvalue_ hold something
  uint8_t *tile_kinds_ = nullptr, *column_kinds_ = nullptr;  // (row blocks, tiles) of the head; one column of it

  int64_t batch_ = -1, head_ = 0, kv_head_ = 0, rows_padded_ = 0, first_row_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

}  // namespace fused_attention::cpu::FA_ISA
