// SPDX-License-Identifier: Apache-2.0
// bf16 forward on AMX tiles. A task is up to rows_per_task query rows of one (batch, head); for each block of keys it
//
//   1. packs K and V of the block (once per head when one block holds all keys),
//   2. for each 32 query rows: S = Q K^T (fp32), online softmax on S, P to bf16, acc += P V,
//
// and divides acc by the row sums at the end (Milakov and Gimelshein 2018; Dao 2023). Rows of S are reduced 16 at a time, so that
// maxima, sums, rescaling factors and lse are vectors with one lane per row.
#pragma once

namespace fused_attention::cpu::FA_ISA {

class AmxForward {
 public:
  static Plan plan(const AttentionProblem& problem, int num_threads) {
    const int64_t heads = problem.batch * problem.num_heads, wanted_tasks = 4 * int64_t{num_threads};
    int64_t rows = problem.head_dim_v > 128 || problem.head_dim_qk > 128 ? 256 : 512;
    rows = min_of(rows, max_of(round_up(problem.seqlen_q, kRows), kRows));
    while (rows > 2 * kRows && heads * divide_up(problem.seqlen_q, rows) < wanted_tasks) rows = round_up(rows / 2, kRows);
    Plan plan{};
    plan.num_tasks = heads * divide_up(problem.seqlen_q, rows);
    plan.rows_per_task = rows;
    AmxForward forward(problem, plan);
    plan.scratch_bytes = forward.carve(nullptr);
    return plan;
  }

  static void run(const AttentionProblem& problem, const Plan& plan, int64_t first_task, int64_t last_task, char* scratch) {
    if (first_task >= last_task) return;
    AmxForward forward(problem, plan);
    forward.carve(scratch);
    const ConfiguredTiles tiles;
    for (int64_t task = first_task; task < last_task; ++task) forward.run_task(task, last_task);
  }

 private:
  static constexpr int64_t kRows = 32;      // query rows per softmax step
  static constexpr int64_t kMaxKeys = 512;  // keys per packed block
  static constexpr float kMaskedBelow = -1e30f;

  AmxForward(const AttentionProblem& problem, const Plan& plan)
      : p(problem),
        rows_per_task(plan.rows_per_task),
        tasks_per_head(max_of(divide_up(problem.seqlen_q, plan.rows_per_task), int64_t{1})),
        dim_qk(round_up(problem.head_dim_qk, 32)),
        dim_v(round_up(problem.head_dim_v, 32)),
        block_keys(min_of(kMaxKeys, round_up(max_of(problem.seqlen_k, int64_t{1}), 32))),
        single_block(problem.seqlen_k <= block_keys),
        held_rows(single_block ? kRows : plan.rows_per_task),
        score_stride(block_keys + 16),
        weight_stride(block_keys + 32),
        dropping(problem.dropout_threshold > 0 && problem.dropout_threshold < 65536),
        score_scale(problem.softmax_scale * kLog2e) {}

  size_t carve(char* memory) {
    Arena arena(memory);
    packed_key = arena.take<Bf16Bits>(block_keys * dim_qk);
    packed_value = arena.take<Bf16Bits>(block_keys * dim_v);
    packed_query = arena.take<Bf16Bits>(held_rows * dim_qk);
    acc = arena.take<float>(held_rows * dim_v);
    row_max = arena.take<float>(held_rows);
    row_sum = arena.take<float>(held_rows);
    scores = arena.take<float>(kRows * score_stride);
    weights = arena.take<Bf16Bits>(kRows * weight_stride);
    if (dropping) keep_bits = arena.take<uint16_t>(kRows * block_keys / 16);
    if (p.key_mask) present_bits = arena.take<uint16_t>(round_up(p.seqlen_k, 32) / 16);
    return arena.used();
  }

  void run_task(int64_t task, int64_t last_task) {
    const int64_t batch_head = task / tasks_per_head, row0 = task % tasks_per_head * rows_per_task;
    set_head(batch_head);
    const int64_t rows = min_of(rows_per_task, p.seqlen_q - row0);
    const int64_t live_rows = max_of(int64_t{0}, min_of(rows, bounds.seqlen_q - row0));
    const int64_t last_key = live_rows > 0 ? visible_keys(p, bounds, row0 + live_rows - 1) : 0;
    for (int64_t i = 0; i < min_of(live_rows, held_rows); i += 16) clear_statistics(i);
    for (int64_t key0 = 0; key0 < last_key; key0 += block_keys) {
      // One block serves the whole head; of several, this task packs what its last row sees.
      const int64_t keys = min_of(block_keys, (single_block ? bounds.seqlen_k : last_key) - key0);
      if (!single_block || packed_head != batch_head) pack_key_block(key0, keys);
      for (int64_t first = 0; first < live_rows; first += kRows) {
        const int64_t block_rows = min_of(kRows, live_rows - first), held = single_block ? 0 : first;
        if (key0 == 0) {
          pack_rows(query_rows(row0 + first, block_rows), round_up(block_rows, 16), dim_qk, packed_query + held * dim_qk);
          if (single_block) clear_statistics(0), clear_statistics(16);
        }
        plan_prefetch(task, last_task, row0 + first, block_rows, key0);
        attend(row0 + first, block_rows, held, key0);
        if (single_block) store_rows(row0 + first, block_rows, 0);
      }
    }
    if (!single_block || last_key == 0)
      for (int64_t first = 0; first < live_rows; first += kRows)
        store_rows(row0 + first, min_of(kRows, live_rows - first), single_block ? 0 : first);
    store_absent_rows(row0 + live_rows, rows - live_rows);
  }

  void set_head(int64_t batch_head) {
    head = batch_head % p.num_heads;
    if (batch == batch_head / p.num_heads) return;
    batch = batch_head / p.num_heads;
    bounds = sequence_bounds(p, batch);
    has_holes = p.key_mask && fill_present_bits(p, batch, bounds.seqlen_k, present_bits);
  }

  void clear_statistics(int64_t held) {
    _mm512_store_ps(row_max + held, _mm512_set1_ps(-kInfinity));
    _mm512_store_ps(row_sum + held, _mm512_setzero_ps());
  }

  RowSource query_rows(int64_t row0, int64_t rows) const {
    return {row_ptr<const Bf16Bits>(p.query, batch, head, row0), p.query.row, rows, p.head_dim_qk, nullptr};
  }

  void pack_key_block(int64_t key0, int64_t keys) {
    const uint16_t* present = has_holes ? present_bits + key0 / 16 : nullptr;
    const int64_t keys_padded = round_up(keys, 32);
    pack_pairs_along_head_dim({row_ptr<const Bf16Bits>(p.key, batch, head, key0), p.key.row, keys, p.head_dim_qk, present}, keys_padded,
                              dim_qk, packed_key);
    pack_pairs_along_sequence({row_ptr<const Bf16Bits>(p.value, batch, head, key0), p.value.row, keys, p.head_dim_v, present}, keys_padded,
                              dim_v, packed_value);
    packed_head = batch * p.num_heads + head;
  }

  // Query rows [row0, row0 + rows), whose state is held at rows `held`, attend to the packed block of keys that starts at key0.
  void attend(int64_t row0, int64_t rows, int64_t held, int64_t key0) {
    const int64_t keys = min_of(block_keys, visible_keys(p, bounds, row0 + rows - 1) - key0);
    if (keys <= 0) return;
    const int64_t keys_padded = round_up(keys, 32), rows_padded = round_up(rows, 16);
    const auto tick = [this] { prefetcher.tick(); };
    // S (rows, keys) = Q K^T
    tile_matmul(rows_padded, keys_padded, dim_qk, packed_query + held * dim_qk, dim_qk, {packed_key, dim_qk / 32, 1}, scores, score_stride,
                false, tick);
    if (dropping) dropout_keep_bits(p, packed_head, row0, rows, key0, keys_padded / 16, keep_bits, block_keys / 16);
    for (int64_t i = 0; i < rows_padded; i += 16) {
      const int64_t live = min_of(int64_t{16}, rows - i);
      if (p.attn_mask.data)
        softmax_16_rows<true, true>(row0 + i, live, i, held + i, key0, keys, keys_padded);
      else if (has_holes)
        softmax_16_rows<false, true>(row0 + i, live, i, held + i, key0, keys, keys_padded);
      else
        softmax_16_rows<false, false>(row0 + i, live, i, held + i, key0, keys, keys_padded);
    }
    // acc (rows, dim_v) += P V
    tile_matmul(rows_padded, dim_v, keys_padded, weights, weight_stride, {packed_value, 1, dim_v / 16}, acc + held * dim_v, dim_v, key0 > 0,
                tick);
  }

  __attribute__((always_inline)) __mmask16 visible_lanes(bool check_holes, int64_t key0, int64_t j, int64_t visible) const {
    const __mmask16 lanes = first_lanes(visible - j);
    return check_holes && has_holes ? static_cast<__mmask16>(lanes & present_bits[(key0 + j) / 16]) : lanes;
  }

  // Rows [first, first + 16) of the score block, of which `live` exist: online softmax, weights to bf16. Rows that do not exist
  // repeat the last one's mask.
  template <bool kHasMask, bool kCheckHoles>
  void softmax_16_rows(int64_t row0, int64_t live, int64_t first, int64_t held, int64_t key0, int64_t keys, int64_t keys_padded) {
    alignas(64) __m512 lanes[16];
    int64_t visible[16];
    for (int64_t i = 0; i < 16; ++i)
      visible[i] = max_of(int64_t{0}, min_of(keys, visible_keys(p, bounds, row0 + min_of(i, live - 1)) - key0));

    // row maxima
    const __m512 minus_infinity = _mm512_set1_ps(-kInfinity);
    for (int64_t i = 0; i < 16; ++i) {
      float* row = scores + (first + i) * score_stride;
      __m512 max0 = minus_infinity, max1 = minus_infinity;
      if constexpr (kHasMask) {
        const float* mask = row_ptr<const float>(p.attn_mask, batch, head, row0 + min_of(i, live - 1)) + key0;
        for (int64_t j = 0; j < visible[i]; j += 16) {
          const __mmask16 seen = visible_lanes(true, key0, j, visible[i]);
          const __m512 bias = _mm512_maskz_loadu_ps(seen, mask + j);
          const __mmask16 unmasked = _mm512_mask_cmp_ps_mask(seen, bias, _mm512_set1_ps(kMaskedBelow), _CMP_NLT_UQ);
          const __m512 biased =
              _mm512_fmadd_ps(bias, _mm512_set1_ps(kLog2e), _mm512_mul_ps(_mm512_load_ps(row + j), _mm512_set1_ps(score_scale)));
          const __m512 x = _mm512_mask_mov_ps(minus_infinity, unmasked, biased);
          _mm512_store_ps(row + j, x);
          max0 = _mm512_max_ps(max0, x);
        }
      } else {
        int64_t j = 0;
        if constexpr (!kCheckHoles)
          for (; j + 32 <= visible[i]; j += 32) {
            max0 = _mm512_max_ps(max0, _mm512_load_ps(row + j));
            max1 = _mm512_max_ps(max1, _mm512_load_ps(row + j + 16));
          }
        for (; j < visible[i]; j += 16) {
          const __mmask16 seen = visible_lanes(kCheckHoles, key0, j, visible[i]);
          max0 = _mm512_mask_max_ps(max0, seen, max0, _mm512_load_ps(row + j));
        }
      }
      lanes[i] = _mm512_max_ps(max0, max1);
    }
    const __m512 scale = _mm512_set1_ps(kHasMask ? 1.0f : score_scale);
    const __m512 old_max = _mm512_load_ps(row_max + held);
    const __m512 block_max = reduce_16_vectors(lanes, Max{});
    const __m512 new_max = _mm512_max_ps(old_max, _mm512_mul_ps(block_max, scale));
    // A row that has seen nothing yet is shifted by 0: its exponents stay -inf and never become -inf + inf.
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(new_max, minus_infinity, _CMP_NEQ_UQ), new_max);
    const __m512 alpha = exp2_masked<4>(_mm512_sub_ps(old_max, shift), 0xffff);
    _mm512_store_ps(row_max + held, new_max);
    alignas(64) float row_shift[16];
    _mm512_store_ps(row_shift, shift);

    // weights and row sums
    for (int64_t i = 0; i < 16; ++i) {
      const float* row = scores + (first + i) * score_stride;
      Bf16Bits* weight = weights + (first + i) * weight_stride;
      const uint16_t* keep = dropping ? keep_bits + (first + i) * (block_keys / 16) : nullptr;
      const __m512 minus_shift = _mm512_set1_ps(-row_shift[i]);
      __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
      const auto step = [&](int64_t j, __mmask16 seen0, __mmask16 seen1) __attribute__((always_inline)) {
        const __m512 p0 = exp2_masked<4>(_mm512_fmadd_ps(_mm512_load_ps(row + j), scale, minus_shift), seen0);
        const __m512 p1 = exp2_masked<4>(_mm512_fmadd_ps(_mm512_load_ps(row + j + 16), scale, minus_shift), seen1);
        sum0 = _mm512_add_ps(sum0, p0);
        sum1 = _mm512_add_ps(sum1, p1);
        __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1, p0));
        if (keep) both = _mm512_maskz_mov_epi16(keep[j / 16] | static_cast<uint32_t>(keep[j / 16 + 1]) << 16, both);
        _mm512_storeu_si512(weight + j, both);
      };
      int64_t j = 0;
      if constexpr (!kCheckHoles)
        for (; j + 32 <= visible[i]; j += 32) step(j, 0xffff, 0xffff);
      for (; j < visible[i]; j += 32)
        step(j, visible_lanes(kCheckHoles, key0, j, visible[i]), visible_lanes(kCheckHoles, key0, j + 16, visible[i]));
      for (; j < keys_padded; j += 32) _mm512_storeu_si512(weight + j, _mm512_setzero_si512());
      lanes[i] = _mm512_add_ps(sum0, sum1);
    }
    const __m512 block_sum = reduce_16_vectors(lanes, Sum{});
    _mm512_store_ps(row_sum + held, _mm512_fmadd_ps(_mm512_load_ps(row_sum + held), alpha, block_sum));

    if (key0 == 0) return;
    alignas(64) float factor[16];
    _mm512_store_ps(factor, alpha);
    for (int64_t i = 0; i < 16; ++i) {
      if (factor[i] == 1.0f) continue;
      for (int64_t d = 0; d < dim_v; d += 16) {
        float* out = acc + (held + i) * dim_v + d;
        _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), _mm512_set1_ps(factor[i])));
      }
    }
  }

  // out = acc / row_sum and lse of query rows [row0, row0 + rows).
  void store_rows(int64_t row0, int64_t rows, int64_t held) {
    for (int64_t i = 0; i < rows; i += 16) {
      const __m512 sum = _mm512_load_ps(row_sum + held + i);
      const __mmask16 nonempty = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 lse = _mm512_fmadd_ps(_mm512_load_ps(row_max + held + i), _mm512_set1_ps(kLn2), natural_log(sum));
      _mm512_mask_storeu_ps(p.lse + (batch * p.num_heads + head) * p.seqlen_q + row0 + i, first_lanes(rows - i),
                            _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), nonempty, lse));
      alignas(64) float inverse[16];
      _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(p.dropout_scale()), sum));
      const int anything = p.dropout_threshold < 65536 ? nonempty : 0;
      for (int64_t r = 0; r < min_of(int64_t{16}, rows - i); ++r) {
        const float* from = acc + (held + i + r) * dim_v;
        Bf16Bits* to = row_ptr<Bf16Bits>(p.out, batch, head, row0 + i + r);
        const __m512 factor = _mm512_set1_ps(inverse[r]);
        const __mmask32 some = anything >> r & 1 ? 0xffffffffu : 0u;
        for (int64_t d = 0; d < p.head_dim_v; d += 32) {
          const __m512bh both =
              _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_load_ps(from + d + 16), factor), _mm512_mul_ps(_mm512_load_ps(from + d), factor));
          _mm512_mask_storeu_epi16(to + d, first_lanes32(p.head_dim_v - d), _mm512_maskz_mov_epi16(some, reinterpret_cast<__m512i>(both)));
        }
      }
    }
  }

  void store_absent_rows(int64_t row0, int64_t rows) {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      store_zero_row(row_ptr<Bf16Bits>(p.out, batch, head, row), p.head_dim_v);
      p.lse[(batch * p.num_heads + head) * p.seqlen_q + row] = -kInfinity;
    }
  }

  void prefetch_reads(const StridedTensor& tensor, int64_t batch_head, int64_t row, int64_t rows, int64_t head_dim) {
    prefetcher.add_reads(row_ptr<const Bf16Bits>(tensor, batch_head / p.num_heads, batch_head % p.num_heads, row), tensor.row * 2, rows,
                         head_dim * 2);
  }
  void prefetch_writes(const StridedTensor& tensor, int64_t batch_head, int64_t row, int64_t rows, int64_t head_dim) {
    prefetcher.add_writes(row_ptr<const Bf16Bits>(tensor, batch_head / p.num_heads, batch_head % p.num_heads, row), tensor.row * 2, rows,
                          head_dim * 2);
  }

  // Spreads over the ticks of one step the rows that later steps pack and write: the next query rows with their output, and a
  // share of the next keys and values.
  void plan_prefetch(int64_t task, int64_t last_task, int64_t row0, int64_t rows, int64_t key0) {
    prefetcher.clear();
    const int64_t task_row0 = task % tasks_per_head * rows_per_task, task_rows = min_of(rows_per_task, p.seqlen_q - task_row0);
    const int64_t batch_head = task / tasks_per_head;
    int64_t next_row = row0 + rows, next_head = batch_head;
    if (next_row >= task_row0 + task_rows) {
      if (task + 1 < last_task)
        next_head = (task + 1) / tasks_per_head, next_row = (task + 1) % tasks_per_head * rows_per_task;
      else
        next_row = p.seqlen_q;
    }
    if (key0 == 0 && next_row < p.seqlen_q) {
      prefetch_reads(p.query, next_head, next_row, min_of(kRows, p.seqlen_q - next_row), p.head_dim_qk);
      prefetch_writes(p.out, next_head, next_row, min_of(kRows, p.seqlen_q - next_row), p.head_dim_v);
    }
    // Keys: the next block of this head, or the first of the next head, in equal shares over the rows that lie before it.
    int64_t key_head = batch_head, next_key = key0 + block_keys, first = row0 - task_row0, span = task_rows;
    if (single_block || next_key >= bounds.seqlen_k) {
      key_head = batch_head + 1, next_key = 0;
      if (single_block) first = row0, span = p.seqlen_q;
    }
    if (key_head * tasks_per_head < last_task) {
      const int64_t keys = min_of(block_keys, p.seqlen_k - next_key);
      const int64_t from = keys * first / span, to = keys * min_of(first + kRows, span) / span;
      prefetch_reads(p.key, key_head, next_key + from, to - from, p.head_dim_qk);
      prefetch_reads(p.value, key_head, next_key + from, to - from, p.head_dim_v);
    }
    const int64_t keys = min_of(block_keys, bounds.seqlen_k - key0);
    prefetcher.spread_over(divide_up(keys, 32) + dim_v / 32);
  }

  const AttentionProblem& p;
  const int64_t rows_per_task, tasks_per_head, dim_qk, dim_v, block_keys;
  const bool single_block;  // one packed block holds all keys of a head
  const int64_t held_rows;  // rows whose accumulators live at once
  const int64_t score_stride, weight_stride;
  const bool dropping;
  const float score_scale;  // scores to exponents of 2

  Bf16Bits *packed_key = nullptr, *packed_value = nullptr, *packed_query = nullptr, *weights = nullptr;
  float *acc = nullptr, *row_max = nullptr, *row_sum = nullptr, *scores = nullptr;
  uint16_t *keep_bits = nullptr, *present_bits = nullptr;

  int64_t batch = -1, head = 0, packed_head = -1;
  SequenceBounds bounds{};
  RowPrefetcher prefetcher;
  bool has_holes = false;
};

}  // namespace fused_attention::cpu::FA_ISA
