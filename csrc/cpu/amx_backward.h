// SPDX-License-Identifier: Apache-2.0
// bf16 backward on AMX tiles; a task is one (batch, head). Everything of score size is kept transposed, keys x queries: then P^T and
// dS^T leave the softmax as the A operands of dV and dK, an interleaved copy of dS^T is the B operand of dQ^T, and lse and delta are
// vectors along the lanes. For each block of keys and each block of query rows that sees it:
//
//   1. S^T = K Q^T,   dP^T = V dO^T                           P = exp(scale S - lse)
//   2. dS = P * (keep * dropout_scale * dP - delta)           delta = rowsum(dO * O) - dlse
//   3. dV += (keep * P)^T dO,   dK += dS^T Q,   dQ^T += K^T dS^T
//
// Q and dO are packed once per head in both B layouts; K and V once per block of keys. (Dao 2023, algorithm 2, with the loops over
// keys outside.) A float attn_mask is row-major and would have to be transposed: such problems run on the fp32-compute kernel.
#pragma once

namespace fused_attention::cpu::FA_ISA {

// Bit i of keep[j * words_stride + w] = weight (row0 + 16 * w + i, key0 + j) is kept: dropout_keep_bits for transposed scores.
// row0, key0 and keys are multiples of 16, rows of 32; rows <= kMaxRows.
template <int64_t kMaxRows>
static void dropout_keep_bits_transposed(const AttentionProblem& problem, int64_t batch_head, int64_t row0, int64_t rows, int64_t key0,
                                         int64_t keys, uint16_t* keep, int64_t words_stride) {
  alignas(64) uint16_t words[kMaxRows];
  for (int64_t j0 = 0; j0 < keys; j0 += 16) {
    dropout_keep_bits(problem, batch_head, row0, rows, key0 + j0, 1, words, 1);
    for (int64_t i = 0; i < rows; i += 32) {
      const __m512i of_rows = _mm512_load_si512(words + i);
      uint16_t* out = keep + j0 * words_stride + i / 16;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const uint32_t of_key = _mm512_test_epi16_mask(of_rows, _mm512_set1_epi16(static_cast<int16_t>(1u << j)));
        out[j * words_stride] = static_cast<uint16_t>(of_key);
        out[j * words_stride + 1] = static_cast<uint16_t>(of_key >> 16);
      }
    }
  }
}

class AmxBackward {
 public:
  static Plan plan(const AttentionProblem& problem, int num_threads) {
    if (problem.attn_mask.data) return plan_backward<bfloat16_t>(problem, num_threads);
    return {problem.batch * problem.num_heads, problem.seqlen_q, AmxBackward(problem).carve(nullptr)};
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    if (problem.attn_mask.data) return run_backward<bfloat16_t>(problem, plan, first_task, last_task, scratch);
    if (first_task >= last_task) return;
    AmxBackward backward(problem);
    backward.carve(scratch);
    const ConfiguredTiles tiles;
    for (int64_t task = first_task; task < last_task; ++task) backward.run_head(task, last_task);
  }

 private:
  static constexpr int64_t kRows = 128, kKeys = 64;  // of one block of scores

  explicit AmxBackward(const AttentionProblem& problem)
      : problem_(problem),
        dim_qk_(round_up(problem.head_dim_qk, 32)),
        dim_v_(round_up(problem.head_dim_v, 32)),
        rows_capacity_(round_up(problem.seqlen_q, 32)),
        dquery_stride_(rows_capacity_ + 16),
        score_scale_(problem.softmax_scale * kLog2e),
        dropping_(problem.dropout_threshold > 0) {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 16; ++i) index[2 * i] = static_cast<uint16_t>(i), index[2 * i + 1] = static_cast<uint16_t>(16 + i);
    pair_lanes_ = _mm512_load_si512(index);
  }

  size_t carve(char* memory) {
    Arena arena(memory);
    query_tiles_ = arena.take<Bf16Bits>(rows_capacity_ * dim_qk_);
    query_pairs_ = arena.take<Bf16Bits>(rows_capacity_ * dim_qk_);
    dout_tiles_ = arena.take<Bf16Bits>(rows_capacity_ * dim_v_);
    dout_pairs_ = arena.take<Bf16Bits>(rows_capacity_ * dim_v_);
    dquery_t_ = arena.take<float>(dim_qk_ * dquery_stride_);
    lse_log2_ = arena.take<float>(rows_capacity_);
    delta_ = arena.take<float>(rows_capacity_);
    seeing_bits_ = arena.take<uint16_t>(rows_capacity_ / 16);
    key_rows_ = arena.take<Bf16Bits>(kKeys * dim_qk_);
    key_t_ = arena.take<Bf16Bits>(dim_qk_ * kKeyStride);
    value_rows_ = arena.take<Bf16Bits>(kKeys * dim_v_);
    dkey_ = arena.take<float>(kKeys * dim_qk_);
    dvalue_ = arena.take<float>(kKeys * dim_v_);
    scores_ = arena.take<float>(kKeys * kScoreStride);
    dweights_ = arena.take<float>(kKeys * kScoreStride);
    weights_ = arena.take<Bf16Bits>(kKeys * kWeightStride);
    dscores_ = arena.take<Bf16Bits>(kKeys * kWeightStride);
    dscore_pairs_ = arena.take<Bf16Bits>(kKeys * kRows);
    if (dropping_) keep_bits_ = arena.take<uint16_t>(kKeys * kRows / 16);
    if (problem_.key_mask) present_bits_ = arena.take<uint16_t>(round_up(problem_.seqlen_k, 32) / 16);
    return arena.used();
  }

  void run_head(int64_t task, int64_t last_task) {
    set_head(task);
    pack_query_side();
    plan_prefetch(task, last_task);
    first_row_ = bounds_.seqlen_k > 0 ? first_row_seeing(problem_, bounds_, 0) / 32 * 32 : rows_padded_;  // rows before it see nothing
    for (int64_t key0 = 0; key0 < bounds_.seqlen_k; key0 += kKeys) run_key_block(key0);
    for (int64_t key = bounds_.seqlen_k; key < problem_.seqlen_k; ++key) {
      store_zero_row(row_ptr<Bf16Bits>(problem_.dkey, batch_, head_, key), problem_.head_dim_qk);
      store_zero_row(row_ptr<Bf16Bits>(problem_.dvalue, batch_, head_, key), problem_.head_dim_v);
    }
    store_dquery();
  }

  void set_head(int64_t task) {
    head_ = task % problem_.num_heads;
    if (batch_ == task / problem_.num_heads) return;
    batch_ = task / problem_.num_heads;
    bounds_ = sequence_bounds(problem_, batch_);
    rows_padded_ = round_up(bounds_.seqlen_q, 32);
    has_holes_ = problem_.key_mask && fill_present_bits(problem_, batch_, bounds_.seqlen_k, present_bits_);
  }

  void pack_query_side() {
    const float* lse_of_head = problem_.lse + (batch_ * problem_.num_heads + head_) * problem_.seqlen_q;
    const uint16_t* seeing_bits = fill_seeing_bits(lse_of_head) ? nullptr : seeing_bits_;
    const RowSource query = rows_of(problem_.query, batch_, head_, 0, bounds_.seqlen_q, problem_.head_dim_qk, seeing_bits);
    const RowSource dout = rows_of(problem_.dout, batch_, head_, 0, bounds_.seqlen_q, problem_.head_dim_v, seeing_bits);
    pack_pairs_along_head_dim(query, rows_padded_, dim_qk_, query_tiles_);
    pack_pairs_along_sequence(query, rows_padded_, dim_qk_, query_pairs_);
    pack_pairs_along_head_dim(dout, rows_padded_, dim_v_, dout_tiles_);
    pack_pairs_along_sequence(dout, rows_padded_, dim_v_, dout_pairs_);
    const RowSource out = rows_of(problem_.out, batch_, head_, 0, bounds_.seqlen_q, problem_.head_dim_v);
    const float* dlse = problem_.dlse ? problem_.dlse + (lse_of_head - problem_.lse) : nullptr;
    for (int64_t row = 0; row < rows_padded_; row += 16) {
      const LaneMask live = first_lanes(bounds_.seqlen_q - row);
      __m512 products[16];
      for (int64_t i = 0; i < 16; ++i) products[i] = row_product(dout, out, row + i);
      __m512 sums = reduce_16_vectors(products, Sum{});
      if (dlse) sums = _mm512_sub_ps(sums, _mm512_maskz_loadu_ps(live, dlse + row));
      _mm512_storeu_ps(delta_ + row, _mm512_maskz_mov_ps(live, sums));
      // Rows that are absent or see nothing get lse = +inf, which makes all their weights exactly 0.
      const __m512 lse = _mm512_maskz_loadu_ps(live, lse_of_head + row), infinity = _mm512_set1_ps(kInfinity);
      _mm512_storeu_ps(lse_log2_ + row, _mm512_mask_mul_ps(infinity, seeing_bits_[row / 16], lse, _mm512_set1_ps(kLog2e)));
    }
  }

  // Which present rows see some key. The others take no gradient, whatever their query and dout hold: both are read as zeros.
  // Returns true when all present rows do.
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

  // Partial sums of dout * out over one row, 16 lanes of them.
  __m512 row_product(const RowSource& dout, const RowSource& out, int64_t row) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim_v_; d += 32) {
      const __m512i a = dout.load32(row, d), b = out.load32(row, d), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
    }
    return sum;
  }

  void run_key_block(int64_t key0) {
    const int64_t keys = min_of(kKeys, bounds_.seqlen_k - key0), keys_padded = round_up(keys, 32);
    const uint16_t* present = has_holes_ ? present_bits_ + key0 / 16 : nullptr;
    const RowSource key = rows_of(problem_.key, batch_, head_, key0, keys, problem_.head_dim_qk, present);
    const RowSource value = rows_of(problem_.value, batch_, head_, key0, keys, problem_.head_dim_v, present);
    const int64_t block_first_row = first_row_seeing(problem_, bounds_, key0) / 32 * 32;
    if (block_first_row < rows_padded_) {
      pack_rows(key, keys_padded, dim_qk_, key_rows_);
      pack_rows(value, keys_padded, dim_v_, value_rows_);
      pack_transposed_rows(key, keys_padded, dim_qk_, key_t_, kKeyStride);
    }
    const auto tick = [this] { prefetcher_.tick(); };
    for (int64_t row0 = block_first_row; row0 < rows_padded_; row0 += kRows) {
      const int64_t rows = min_of(kRows, rows_padded_ - row0);
      const bool more = row0 > block_first_row;
      // S^T (keys, rows) = K Q^T, dP^T = V dO^T
      tile_matmul(keys_padded, rows, dim_qk_, key_rows_, dim_qk_, {query_tiles_ + row0 * dim_qk_, dim_qk_ / 32, 1}, scores_, kScoreStride,
                  false, tick);
      tile_matmul(keys_padded, rows, dim_v_, value_rows_, dim_v_, {dout_tiles_ + row0 * dim_v_, dim_v_ / 32, 1}, dweights_, kScoreStride,
                  false, tick);
      if (dropping_)
        dropout_keep_bits_transposed<kRows>(problem_, batch_ * problem_.num_heads + head_, row0, rows, key0, keys_padded, keep_bits_,
                                            kRows / 16);
      const bool masked = keys < keys_padded || has_holes_ || row0 < first_row_seeing(problem_, bounds_, key0 + keys - 1);
      if (masked)
        dropping_ ? softmax_gradient<true, true>(row0, rows, key, key0, keys_padded)
                  : softmax_gradient<true, false>(row0, rows, key, key0, keys_padded);
      else
        dropping_ ? softmax_gradient<false, true>(row0, rows, key, key0, keys_padded)
                  : softmax_gradient<false, false>(row0, rows, key, key0, keys_padded);
      // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
      tile_matmul(keys_padded, dim_v_, rows, weights_, kWeightStride, {dout_pairs_ + row0 * dim_v_, 1, dim_v_ / 16}, dvalue_, dim_v_, more,
                  tick);
      tile_matmul(keys_padded, dim_qk_, rows, dscores_, kWeightStride, {query_pairs_ + row0 * dim_qk_, 1, dim_qk_ / 16}, dkey_, dim_qk_,
                  more, tick);
      tile_matmul(dim_qk_, rows, keys_padded, key_t_, kKeyStride, {dscore_pairs_, 1, kRows / 16}, dquery_t_ + row0, dquery_stride_,
                  key0 > 0, tick);
    }
    store_key_gradients(key0, keys, key, block_first_row < rows_padded_);
  }

  void store_key_gradients(int64_t key0, int64_t keys, const RowSource& key, bool seen) {
    const __m512 dkey_scale = _mm512_set1_ps(problem_.softmax_scale), dvalue_scale = _mm512_set1_ps(problem_.dropout_scale());
    for (int64_t j = 0; j < keys; ++j) {
      const bool written = seen && key.present(j);
      store_row(row_ptr<Bf16Bits>(problem_.dkey, batch_, head_, key0 + j), dkey_ + j * dim_qk_, problem_.head_dim_qk, dkey_scale, written);
      store_row(row_ptr<Bf16Bits>(problem_.dvalue, batch_, head_, key0 + j), dvalue_ + j * dim_v_, problem_.head_dim_v, dvalue_scale,
                written);
    }
  }

  static void store_row(Bf16Bits* to, const float* from, int64_t head_dim, __m512 scale, bool present) {
    if (!present) return store_zero_row(to, head_dim);
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(from + d), scale), high = _mm512_mul_ps(_mm512_load_ps(from + d + 16), scale);
      _mm512_mask_storeu_epi16(to + d, first_lanes32(head_dim - d), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }

  // Lanes i with row0 + i >= first: the rows from the first one that sees the key on.
  static __attribute__((always_inline)) __mmask16 lanes_from(int64_t first, int64_t row0) {
    return first <= row0 ? 0xffff : first >= row0 + 16 ? 0 : static_cast<__mmask16>(0xffffu << (first - row0));
  }

  // P^T and dS^T of the block, in bf16, from S^T and dP^T; two keys at a time, so that their values also interleave into pairs.
  template <bool kMasked, bool kDropping>
  void softmax_gradient(int64_t row0, int64_t rows, const RowSource& key, int64_t key0, int64_t keys_padded) {
    constexpr int64_t kNever = INT64_MAX / 2;
    const __m512 scale = _mm512_set1_ps(score_scale_), dropout_scale = _mm512_set1_ps(problem_.dropout_scale());
    for (int64_t j = 0; j < keys_padded; j += 2) {
      const int64_t first0 = kMasked ? (key.present(j) ? first_row_seeing(problem_, bounds_, key0 + j) : kNever) : 0;
      const int64_t first1 = kMasked ? (key.present(j + 1) ? first_row_seeing(problem_, bounds_, key0 + j + 1) : kNever) : 0;
      Bf16Bits* pairs = dscore_pairs_ + (j / 32) * (kRows / 16) * kTileElements + (j % 32 / 2) * 32;
      for (int64_t i = 0; i < rows; i += 16) {
        const __m512 lse = _mm512_load_ps(lse_log2_ + row0 + i), row_delta = _mm512_load_ps(delta_ + row0 + i);
        const int64_t at0 = j * kScoreStride + i, at1 = at0 + kScoreStride;
        const __mmask16 visible0 = kMasked ? lanes_from(first0, row0 + i) : 0xffff,
                        visible1 = kMasked ? lanes_from(first1, row0 + i) : 0xffff;
        __mmask16 nonzero0, nonzero1;
        __m512 p0 = exp2_masked<3>(_mm512_fmsub_ps(_mm512_load_ps(scores_ + at0), scale, lse), visible0, &nonzero0);
        __m512 p1 = exp2_masked<3>(_mm512_fmsub_ps(_mm512_load_ps(scores_ + at1), scale, lse), visible1, &nonzero1);
        __m512 dp0 = _mm512_load_ps(dweights_ + at0), dp1 = _mm512_load_ps(dweights_ + at1);
        __mmask32 kept = 0xffffffffu;
        if constexpr (kDropping) {
          const __mmask16 keep0 = keep_bits_[j * (kRows / 16) + i / 16], keep1 = keep_bits_[(j + 1) * (kRows / 16) + i / 16];
          kept = keep0 | static_cast<__mmask32>(keep1) << 16;
          dp0 = _mm512_maskz_mul_ps(keep0, dp0, dropout_scale);
          dp1 = _mm512_maskz_mul_ps(keep1, dp1, dropout_scale);
        }
        // Selected, not multiplied: dP may be infinite or NaN where P is 0.
        const __m512 ds0 = _mm512_maskz_mul_ps(nonzero0, p0, _mm512_sub_ps(dp0, row_delta));
        const __m512 ds1 = _mm512_maskz_mul_ps(nonzero1, p1, _mm512_sub_ps(dp1, row_delta));
        __m512i both_p = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1, p0));
        const __m512i both_ds = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds1, ds0));
        if constexpr (kDropping) both_p = _mm512_maskz_mov_epi16(kept, both_p);
        store_halves(weights_ + j * kWeightStride + i, both_p);
        store_halves(dscores_ + j * kWeightStride + i, both_ds);
        _mm512_store_si512(pairs + i / 16 * kTileElements, _mm512_permutexvar_epi16(pair_lanes_, both_ds));
      }
    }
  }

  static __attribute__((always_inline)) void store_halves(Bf16Bits* row, __m512i both) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + kWeightStride), _mm512_extracti64x4_epi64(both, 1));
  }

  void store_dquery() {
    const __m512 scale = _mm512_set1_ps(problem_.softmax_scale);
    for (int64_t row = 0; row < problem_.seqlen_q; ++row)
      if (row < first_row_ || row >= bounds_.seqlen_q)
        store_zero_row(row_ptr<Bf16Bits>(problem_.dquery, batch_, head_, row), problem_.head_dim_qk);
    for (int64_t row = first_row_; row < bounds_.seqlen_q; row += 16) {
      const int64_t rows = min_of(bounds_.seqlen_q - row, int64_t{16});
      for (int64_t d = 0; d < problem_.head_dim_qk; d += 32) {
        __m512i low[16], high[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          low[i] = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_load_ps(dquery_t_ + (d + i) * dquery_stride_ + row)));
        transpose16(low);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          high[i] = _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_load_ps(dquery_t_ + (d + 16 + i) * dquery_stride_ + row)));
        transpose16(high);
        Bf16Bits* to = row_ptr<Bf16Bits>(problem_.dquery, batch_, head_, row) + d;
        const __mmask32 lanes = first_lanes32(problem_.head_dim_qk - d);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (i < rows)
            _mm512_mask_storeu_epi16(
                to + i * problem_.dquery.row, lanes,
                reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high[i]), _mm512_castsi512_ps(low[i]))));
      }
    }
  }

  // This head's gradients and the next head's inputs, spread over the matmuls of this head.
  void plan_prefetch(int64_t task, int64_t last_task) {
    prefetcher_.clear();
    const auto writes = [&](const StridedTensor& tensor, int64_t rows, int64_t head_dim) {
      prefetcher_.add_writes(row_ptr<const Bf16Bits>(tensor, batch_, head_, 0), tensor.row * 2, rows, head_dim * 2);
    };
    writes(problem_.dkey, problem_.seqlen_k, problem_.head_dim_qk);
    writes(problem_.dvalue, problem_.seqlen_k, problem_.head_dim_v);
    writes(problem_.dquery, problem_.seqlen_q, problem_.head_dim_qk);
    if (task + 1 < last_task) {
      const int64_t next_batch = (task + 1) / problem_.num_heads, next_head = (task + 1) % problem_.num_heads;
      const auto reads = [&](const StridedTensor& tensor, int64_t rows, int64_t head_dim) {
        prefetcher_.add_reads(row_ptr<const Bf16Bits>(tensor, next_batch, next_head, 0), tensor.row * 2, rows, head_dim * 2);
      };
      reads(problem_.query, problem_.seqlen_q, problem_.head_dim_qk);
      reads(problem_.dout, problem_.seqlen_q, problem_.head_dim_v);
      reads(problem_.out, problem_.seqlen_q, problem_.head_dim_v);
      reads(problem_.key, problem_.seqlen_k, problem_.head_dim_qk);
      reads(problem_.value, problem_.seqlen_k, problem_.head_dim_v);
    }
    // 32 x 32 blocks of all five products; under a causal mask about half of them are computed.
    const int64_t row_tiles = rows_padded_ / 32, key_tiles = divide_up(bounds_.seqlen_k, 32);
    const int64_t ticks = 2 * row_tiles * key_tiles + divide_up(rows_padded_, kRows) * key_tiles * (dim_qk_ + dim_v_) / 32 +
                          divide_up(bounds_.seqlen_k, kKeys) * row_tiles * dim_qk_ / 32;
    prefetcher_.spread_over(problem_.causal == Causal::none ? ticks : ticks / 2);
  }

  static constexpr int64_t kScoreStride = kRows + 16, kWeightStride = kRows + 32, kKeyStride = kKeys + 32;

  const AttentionProblem& problem_;
  const int64_t dim_qk_, dim_v_, rows_capacity_, dquery_stride_;
  const float score_scale_;  // scores to exponents of 2
  const bool dropping_;
  __m512i pair_lanes_;  // {a0 .. a15, b0 .. b15} to {a0, b0, a1, b1, ...}

  Bf16Bits *query_tiles_ = nullptr, *query_pairs_ = nullptr, *dout_tiles_ = nullptr, *dout_pairs_ = nullptr;
  Bf16Bits *key_rows_ = nullptr, *key_t_ = nullptr, *value_rows_ = nullptr, *weights_ = nullptr, *dscores_ = nullptr,
           *dscore_pairs_ = nullptr;
  float *dquery_t_ = nullptr, *lse_log2_ = nullptr, *delta_ = nullptr, *dkey_ = nullptr, *dvalue_ = nullptr, *scores_ = nullptr,
        *dweights_ = nullptr;
  uint16_t *keep_bits_ = nullptr, *present_bits_ = nullptr, *seeing_bits_ = nullptr;

  int64_t batch_ = -1, head_ = 0, rows_padded_ = 0, first_row_ = 0;
  SequenceBounds bounds_{};
  bool has_holes_ = false;
  RowPrefetcher prefetcher_;
};

}  // namespace fused_attention::cpu::FA_ISA
