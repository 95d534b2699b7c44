// SPDX-License-Identifier: Apache-2.0
// Runs every CPU kernel without Python, so that it can be built with AddressSanitizer and UndefinedBehaviorSanitizer, and
// compares it with double loops. Every tensor lies in a heap block of exactly its size, absent rows hold NaN, outputs and scratch
// memory start as NaN, and the gaps between the rows of a strided output must stay untouched.
// Prints one line per instruction set and exits with 1 at the first failure.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "philox.h"

#ifdef WITHOUT_AVX512  // dispatch.cpp asks for these and must not call them
namespace fused_attention::cpu {
extern const KernelTable kAvx512Kernels{};
extern const Kernel kAmxForward{}, kAmxBackward{}, kAmxForwardBf16x3{}, kAmxBackwardBf16x3{}, kAvx512Bf16Forward{}, kAvx512Bf16Backward{};
bool amx_available() { return false; }
bool avx512_bf16_available() { return false; }
}  // namespace fused_attention::cpu
#endif

using namespace fused_attention;

namespace {

// 16-bit floats, written independently of the kernels.
float widen(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

uint16_t narrow(float value, Dtype dtype) {  // truncates: only used to make inputs, which are read back through widen()
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (dtype == Dtype::bfloat16) return static_cast<uint16_t>(word >> 16);
  if (std::isnan(value)) return 0x7e00;
  if (std::fabs(value) < 1e-4f) return 0;
  return static_cast<uint16_t>((word >> 16 & 0x8000) | ((word >> 13 & 0x3ffff) - (112 << 10)));
}

enum Layout { heads_first, rows_first, packed, gaps };  // (B,H,L,D), (B,L,H,D), one of three in (B,L,3,H,D), rows with gaps

constexpr unsigned char kGuard = 0xff;  // NaN in every dtype

struct Tensor {  // (batch, heads, rows, columns)
  Dtype dtype;
  int64_t batch, heads, rows, columns;
  StridedTensor view;
  std::unique_ptr<unsigned char[]> memory;
  size_t bytes;

  Tensor(Dtype type, int64_t b, int64_t h, int64_t l, int64_t d, Layout layout) : dtype(type), batch(b), heads(h), rows(l), columns(d) {
    const int64_t size = element_size();
    int64_t elements = b * h * l * d, first = 0;
    switch (layout) {
      case heads_first:
        view.batch = h * l * d, view.head = l * d, view.row = d;
        break;
      case rows_first:
        view.batch = l * h * d, view.head = d, view.row = h * d;
        break;
      case packed:
        view.batch = l * 3 * h * d, view.head = d, view.row = 3 * h * d, elements *= 3, first = h * d;
        break;
      case gaps:
        view.row = d + 3, view.head = l * view.row, view.batch = h * view.head, elements = b * view.batch, first = elements ? 1 : 0;
        break;
    }
    bytes = static_cast<size_t>(elements * size);
    memory.reset(new unsigned char[bytes]);
    std::memset(memory.get(), kGuard, bytes);
    view.data = memory.get() + (elements ? first * size : 0);
  }
  int64_t element_size() const { return dtype == Dtype::float32 ? 4 : 2; }
  unsigned char* address(int64_t b, int64_t h, int64_t r, int64_t c) const {
    return static_cast<unsigned char*>(view.data) + (b * view.batch + h * view.head + r * view.row + c) * element_size();
  }
  float get(int64_t b, int64_t h, int64_t r, int64_t c) const {
    const unsigned char* p = address(b, h, r, c);
    if (dtype == Dtype::float32) {
      float value;
      std::memcpy(&value, p, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return widen(bits, dtype);
  }
  void set(int64_t b, int64_t h, int64_t r, int64_t c, float value) {
    unsigned char* p = address(b, h, r, c);
    const uint16_t bits = narrow(value, dtype);
    if (dtype == Dtype::float32)
      std::memcpy(p, &value, 4);
    else
      std::memcpy(p, &bits, 2);
  }
  // Bytes outside the view must still hold the guard.
  bool gaps_untouched() const {
    std::vector<bool> inside(bytes, false);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < columns * element_size(); ++i) inside[static_cast<size_t>(address(b, h, r, 0) - memory.get() + i)] = true;
    for (size_t i = 0; i < bytes; ++i)
      if (!inside[i] && memory[i] != kGuard) return false;
    return true;
  }
};

enum Causal { kNone, kTopLeft, kBottomRight };

struct Case {
  int64_t batch, heads, seqlen_q, seqlen_k, head_dim_qk, head_dim_v;
  Causal causal;
  bool key_mask, lengths, attn_mask, dropout, dlse;
  Layout layout;
  int64_t heads_per_key_head = 1;
  int32_t window_left = kUnlimited, window_right = kUnlimited;
  float softcap = 0;
  bool alibi = false, sinks = false;
  int64_t mask_key_stride = 1;
  bool part_tasks = false;  // each part of the keys is a task
  bool prepared = false;    // what masks, as bits and lists of tiles
  bool packed = false;      // the batch as packed sequences; layout must be rows_first
  MaskDtype mask_dtype = MaskDtype::float32;
  int32_t diagonal = 0;
};

// Odd sizes sit one off the kernels' blocks: 16 lanes, 32 and 64 columns, 48 and 96 rows, 512 keys.
const Case kCases[] = {
    {2, 2, 37, 53, 40, 40, kNone, false, false, false, false, false, rows_first},
    {1, 1, 1, 1, 1, 1, kTopLeft, false, false, false, true, true, gaps},
    {2, 1, 5, 5, 128, 128, kBottomRight, false, true, false, false, true, packed},
    {1, 2, 65, 63, 17, 33, kTopLeft, true, false, true, true, true, heads_first},
    {2, 2, 70, 70, 64, 64, kTopLeft, true, true, false, true, false, packed},
    {1, 1, 97, 129, 8, 24, kBottomRight, true, true, true, false, true, gaps},
    {1, 1, 49, 513, 72, 72, kNone, true, false, false, true, true, rows_first},
    {1, 2, 130, 600, 16, 16, kBottomRight, false, true, false, true, true, rows_first},
    {1, 1, 17, 1030, 32, 20, kNone, false, false, true, true, false, gaps},
    {1, 1, 200, 31, 48, 80, kTopLeft, true, false, false, false, false, packed},
    {1, 1, 33, 20, 256, 255, kBottomRight, false, false, true, true, true, gaps},
    {1, 2, 1, 45, 64, 64, kNone, true, false, false, true, true, rows_first},  // one or two rows: K and V are read where they lie
    {2, 1, 2, 530, 40, 24, kBottomRight, true, true, true, true, false, gaps},
    {0, 2, 8, 8, 16, 16, kNone, false, false, false, false, false, rows_first},
    {2, 0, 8, 8, 16, 16, kNone, false, false, false, false, false, rows_first},
    {2, 2, 0, 8, 16, 16, kNone, false, true, false, true, false, rows_first},
    {2, 2, 8, 0, 16, 16, kTopLeft, false, false, false, true, true, gaps},
    {1, 4, 70, 90, 24, 40, kBottomRight, false, true, false, true, true, gaps, 2, 30, 5},
    {2, 2, 65, 129, 16, 16, kNone, true, false, false, false, true, rows_first, 1, 20, kUnlimited, 2.0f, true, true},
    {1, 4, 33, 300, 16, 20, kTopLeft, false, false, true, false, true, packed, 4, kUnlimited, kUnlimited, 1.5f, true, true, 2, true},
    {2, 1, 100, 600, 32, 32, kNone, true, false, true, false, false, heads_first, 1, kUnlimited, kUnlimited, 0, false, true, 1, true},
    {1, 2, 150, 200, 40, 40, kTopLeft, true, true, false, true, true, gaps, 1, 60, kUnlimited, 0, true, false, 1, false, true},
    {3, 2, 37, 53, 24, 24, kBottomRight, false, true, false, true, true, rows_first, 2, 9, 3, 0, true, true, 1, false, false, true},
    {2, 2, 2, 45, 40, 24, kBottomRight, true, false, true, true, false, rows_first, 2, 20, kUnlimited, 2.0f, true, true, 3},
    {8, 4, 2, 70, 24, 40, kBottomRight, true, false, false, true, true, rows_first, 2, 66, kUnlimited, 1.5f, true,
     true},  // two key heads a task
    {1,          2, 70,         150,        40, 24,    kTopLeft, false, false, true,  false, true,
     rows_first, 1, kUnlimited, kUnlimited, 0,  false, false,    1,     false, false, false, MaskDtype::boolean},
    {2,    1, 33,         77,         24, 24,    kNone, true, false, true,  true,  false,
     gaps, 1, kUnlimited, kUnlimited, 0,  false, false, 1,    false, false, false, MaskDtype::bfloat16},
    {1,          2, 2,          531,        24, 24,    kNone, true, false, true,  false, true,
     rows_first, 1, kUnlimited, kUnlimited, 0,  false, false, 1,    false, false, false, MaskDtype::float16},
    {1,      1, 40, 90,         16, 16,    kBottomRight, false, true,  true,  false, true,
     packed, 1, 15, kUnlimited, 0,  false, false,        3,     false, false, false, MaskDtype::boolean},
    {2,          1, 70,         100,        16, 24,    kTopLeft, true, false, true, false, true,
     rows_first, 1, kUnlimited, kUnlimited, 0,  false, false,    1,    false, true, false, MaskDtype::bfloat16},
    // Blocks of rows meet several blocks of keys: of 2200 rows and 195 keys, 1100 and 130 are there.
    {1, 1, 2200, 195, 160, 160, kNone, true, true, true, false, true, gaps},
};

// Owns what a problem points to.
struct Inputs {
  Case c;
  Tensor query, key, value, out, out_error, dout, dquery, dkey, dvalue;
  std::vector<float> lse, dlse, attn_mask, slopes, sinks;
  std::vector<float> dattn_mask, dslopes, dsinks, dquery_parts;
  std::vector<unsigned char> mask_elements;  // attn_mask in its dtype
  std::vector<uint32_t> bits;
  std::vector<int32_t> tiles, starts_q, starts_k;
  std::vector<uint8_t> key_mask;
  std::vector<int32_t> key_lengths, query_lengths;
  std::vector<int64_t> rng_state{0x123456789abcdef, 0x1234500000007};
  AttentionProblem problem;

  Inputs(const Case& spec, Dtype dtype)
      : c(spec),
        query(dtype, c.batch, c.heads, c.seqlen_q, c.head_dim_qk, c.layout),
        key(dtype, c.batch, c.heads / c.heads_per_key_head, c.seqlen_k, c.head_dim_qk, c.layout),
        value(dtype, c.batch, c.heads / c.heads_per_key_head, c.seqlen_k, c.head_dim_v, c.layout),
        out(dtype, c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.layout),
        out_error(dtype, c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.layout),
        dout(dtype, c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.layout),
        dquery(dtype, c.batch, c.heads, c.seqlen_q, c.head_dim_qk, c.layout),
        dkey(dtype, c.batch, c.heads / c.heads_per_key_head, c.seqlen_k, c.head_dim_qk, c.layout),
        dvalue(dtype, c.batch, c.heads / c.heads_per_key_head, c.seqlen_k, c.head_dim_v, c.layout) {
    std::mt19937 generator(static_cast<unsigned>(c.seqlen_q * 131 + c.seqlen_k));
    std::normal_distribution<float> normal;
    if (c.lengths) {
      for (int64_t b = 0; b < c.batch; ++b) {
        key_lengths.push_back(static_cast<int32_t>(b == 0 ? c.seqlen_k * 2 / 3 : c.seqlen_k + 5));  // the second is clamped
        query_lengths.push_back(static_cast<int32_t>(b == 0 ? (c.seqlen_q + 1) / 2 : -1));
      }
    }
    if (c.key_mask)
      for (int64_t i = 0; i < c.batch * c.seqlen_k; ++i) key_mask.push_back(i % 5 != 2 && i % c.seqlen_k < c.seqlen_k - 4);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h) {
        fill(query, b, h, generator, normal, [&](int64_t i) { return query_present(b, i); });
        fill(dout, b, h, generator, normal, [&](int64_t i) { return query_present(b, i); });
        if (h % c.heads_per_key_head != 0) continue;
        fill(key, b, key_head(h), generator, normal, [&](int64_t j) { return key_present(b, j); });
        fill(value, b, key_head(h), generator, normal, [&](int64_t j) { return key_present(b, j); });
      }
    }
    lse.assign(static_cast<size_t>(c.batch * c.heads * c.seqlen_q), NAN);
    if (c.dlse)
      for (size_t i = 0; i < lse.size(); ++i) dlse.push_back(normal(generator));
    if (c.attn_mask)  // (H, Lq, Lk), broadcast over the batch
      for (int64_t i = 0; i < c.heads * c.seqlen_q * c.seqlen_k * c.mask_key_stride; ++i)
        attn_mask.push_back(i % c.mask_key_stride ? NAN : i % 7 == 3 ? -INFINITY : i % 11 == 4 ? -2e38f : normal(generator));
    encode_mask();
    for (int64_t i = 0; c.alibi && i < c.batch * c.heads; ++i) slopes.push_back(0.02f * static_cast<float>(i + 1));
    for (int64_t h = 0; c.sinks && h < c.heads; ++h) sinks.push_back(normal(generator));

    problem.dtype = dtype;
    problem.batch = c.batch, problem.num_heads = c.heads, problem.num_heads_kv = c.heads / c.heads_per_key_head;
    problem.window_left = c.window_left, problem.window_right = c.causal == kNone ? c.window_right : 0;
    problem.diagonal = c.diagonal, problem.bottom_right = c.causal == kBottomRight;
    problem.softcap = c.softcap;
    problem.seqlen_q = c.seqlen_q, problem.seqlen_k = c.seqlen_k;
    problem.head_dim_qk = c.head_dim_qk, problem.head_dim_v = c.head_dim_v;
    problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim_qk));
    problem.query = query.view, problem.key = key.view, problem.value = value.view, problem.out = out.view, problem.dout = dout.view;
    problem.dquery = dquery.view, problem.dkey = dkey.view, problem.dvalue = dvalue.view;
    if (dtype != Dtype::float32) problem.out_error = out_error.view;
    problem.lse = lse.data();
    if (c.dlse) problem.dlse = dlse.data();
    const int64_t line = c.seqlen_k * c.mask_key_stride;
    if (c.attn_mask) problem.attn_mask = {mask_elements.data(), 0, c.seqlen_q * line, line}, problem.attn_mask_key = c.mask_key_stride;
    problem.attn_mask_dtype = c.mask_dtype;
    if (c.alibi) problem.alibi_slopes = slopes.data(), problem.alibi_slopes_batch = c.heads, problem.alibi_slopes_head = 1;
    if (c.sinks) problem.sinks = sinks.data();
    if (c.prepared) prepare();
    if (c.packed) pack();
    problem.num_key_parts = static_cast<int32_t>(cpu::key_parts(c.seqlen_k));
    const auto place = [](std::vector<float>& gradient, int64_t size) {
      gradient.assign(static_cast<size_t>(size), 0.0f);
      return gradient.data();
    };
    const int64_t dquery_size = c.batch * c.heads * c.seqlen_q * c.head_dim_qk;
    if (c.part_tasks) problem.dquery_parts = place(dquery_parts, problem.num_key_parts * dquery_size);
    if (c.alibi) problem.dalibi_slopes = place(dslopes, c.batch * c.heads * problem.num_key_parts);
    if (c.sinks) problem.dsinks = place(dsinks, c.batch * c.heads);
    if (c.attn_mask) {  // one part for each batch element
      problem.num_mask_parts = static_cast<int32_t>(std::max<int64_t>(c.batch, 1));
      problem.dattn_mask = place(dattn_mask, problem.num_mask_parts * c.heads * c.seqlen_q * c.seqlen_k);
      problem.dattn_mask_part = c.heads * c.seqlen_q * c.seqlen_k, problem.dattn_mask_head = c.seqlen_q * c.seqlen_k;
      problem.dattn_mask_row = c.seqlen_k, problem.dattn_mask_key = 1;
    }
    if (c.key_mask) problem.key_mask = key_mask.data(), problem.key_mask_batch = c.seqlen_k, problem.key_mask_key = 1;
    if (c.lengths) problem.key_lengths = key_lengths.data(), problem.query_lengths = query_lengths.data();
    if (c.dropout) problem.dropout_threshold = 13107, problem.rng_state = rng_state.data();
  }

  template <class Present>
  static void fill(Tensor& tensor, int64_t b, int64_t h, std::mt19937& generator, std::normal_distribution<float>& normal,
                   Present present) {
    for (int64_t r = 0; r < tensor.rows; ++r)
      for (int64_t d = 0; d < tensor.columns; ++d) tensor.set(b, h, r, d, present(r) ? normal(generator) : NAN);
  }

  // attn_mask -> mask_elements, and back what its dtype holds of the values.
  void encode_mask() {
    const Dtype half = c.mask_dtype == MaskDtype::bfloat16 ? Dtype::bfloat16 : Dtype::float16;
    const size_t size = c.mask_dtype == MaskDtype::float32 ? 4 : c.mask_dtype == MaskDtype::boolean ? 1 : 2;
    mask_elements.resize(attn_mask.size() * size);
    for (size_t i = 0; i < attn_mask.size(); ++i) {
      float& value = attn_mask[i];
      const bool hidden = value < -1e30f;
      unsigned char* element = mask_elements.data() + i * size;
      if (c.mask_dtype == MaskDtype::float32) {
        std::memcpy(element, &value, 4);
      } else if (c.mask_dtype == MaskDtype::boolean) {
        *element = !hidden;
        value = hidden ? -INFINITY : 0.0f;
      } else {
        const uint16_t infinity = half == Dtype::bfloat16 ? 0xff80 : 0xfc00, bits_of_value = hidden ? infinity : narrow(value, half);
        std::memcpy(element, &bits_of_value, 2);
        value = widen(bits_of_value, half);
      }
    }
  }

  int64_t keys(int64_t b) const { return c.lengths ? std::clamp<int64_t>(key_lengths[static_cast<size_t>(b)], 0, c.seqlen_k) : c.seqlen_k; }
  int64_t queries(int64_t b) const {
    return c.lengths ? std::clamp<int64_t>(query_lengths[static_cast<size_t>(b)], 0, c.seqlen_q) : c.seqlen_q;
  }
  // Bits of what `visible` says for each batch element and head, and the lists of tiles with 64 rows and keys that hold any.
  void prepare() {
    const int64_t words = (c.seqlen_k + 31) / 32, row_blocks = (c.seqlen_q + 63) / 64, num_tiles = (c.seqlen_k + 63) / 64;
    bits.assign(static_cast<size_t>(c.batch * c.heads * c.seqlen_q * words), 0);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t i = 0; i < c.seqlen_q; ++i)
          for (int64_t j = 0; j < c.seqlen_k; ++j)
            if (visible(b, h, i, j)) bits[static_cast<size_t>(((b * c.heads + h) * c.seqlen_q + i) * words + j / 32)] |= 1u << (j % 32);
        for (int64_t block = 0; block < row_blocks; ++block) {
          std::vector<int32_t> full, mixed;
          for (int64_t tile = 0; tile < num_tiles; ++tile) {
            int64_t seen = 0;
            const int64_t last = std::min(block * 64 + 64, c.seqlen_q);
            for (int64_t i = block * 64; i < last; ++i)
              for (int64_t j = tile * 64; j < std::min(tile * 64 + 64, c.seqlen_k); ++j) seen += visible(b, h, i, j);
            if (seen > 0) (seen == 64 * (last - block * 64) ? full : mixed).push_back(static_cast<int32_t>(tile));
          }
          std::vector<int32_t> list(static_cast<size_t>(2 + num_tiles), -1);
          list[0] = static_cast<int32_t>(full.size()), list[1] = static_cast<int32_t>(mixed.size());
          std::copy(full.begin(), full.end(), list.begin() + 2);
          std::copy(mixed.begin(), mixed.end(), list.rbegin());
          tiles.insert(tiles.end(), list.begin(), list.end());
        }
      }
    const int64_t line = 2 + num_tiles;
    problem.mask_bits = {bits.data(), c.heads * c.seqlen_q * words, c.seqlen_q * words, words};
    problem.row_tiles = {tiles.data(), c.heads * row_blocks * line, row_blocks * line, line, static_cast<int32_t>(num_tiles)};
    problem.window_left = problem.window_right = kUnlimited;
  }

  // (B, L, H, D) memory is that of sequences packed one after another.
  void pack() {
    for (int64_t b = 0; b <= c.batch; ++b)
      starts_q.push_back(static_cast<int32_t>(b * c.seqlen_q)), starts_k.push_back(static_cast<int32_t>(b * c.seqlen_k));
    problem.cu_seqlens_q = starts_q.data(), problem.cu_seqlens_k = starts_k.data();
    problem.num_tokens_q = c.batch * c.seqlen_q, problem.num_tokens_k = c.batch * c.seqlen_k;
    for (StridedTensor* tensor : {&problem.query, &problem.key, &problem.value, &problem.out, &problem.out_error, &problem.dout,
                                  &problem.dquery, &problem.dkey, &problem.dvalue})
      tensor->batch = 0;
  }

  int64_t key_head(int64_t h) const { return h / c.heads_per_key_head; }
  size_t lse_index(int64_t b, int64_t h, int64_t i) const {
    return static_cast<size_t>(c.packed ? (h * c.batch + b) * c.seqlen_q + i : (b * c.heads + h) * c.seqlen_q + i);
  }
  int64_t distance(int64_t b, int64_t i, int64_t j) const {
    return j - i - c.diagonal - (c.causal == kBottomRight ? keys(b) - queries(b) : 0);
  }
  bool query_present(int64_t b, int64_t i) const { return i < queries(b); }
  bool key_present(int64_t b, int64_t j) const { return j < keys(b) && (!c.key_mask || key_mask[static_cast<size_t>(b * c.seqlen_k + j)]); }
  float bias(int64_t h, int64_t i, int64_t j) const {
    return c.attn_mask ? attn_mask[static_cast<size_t>(((h * c.seqlen_q + i) * c.seqlen_k + j) * c.mask_key_stride)] : 0.0f;
  }
  bool visible(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t d = distance(b, i, j);
    return query_present(b, i) && key_present(b, j) && (c.causal == kNone || d <= 0) && d >= -int64_t{c.window_left} &&
           d <= c.window_right && bias(h, i, j) >= -1e30f;
  }
  double keep_factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!c.dropout) return 1.0;
    const PhiloxKey seed = PhiloxKey::from_rng_state(rng_state.data());
    uint32_t words[4] = {static_cast<uint32_t>(j / 16 * 4 + j % 8 / 2), static_cast<uint32_t>(i / 16 * 8 + i % 8),
                         static_cast<uint32_t>(b * c.heads + h), seed.offset};
    philox4x32(words, seed.key0, seed.key1);
    const int64_t lane = i / 8 % 2 * 4 + j / 8 % 2 * 2 + j % 2;
    const uint32_t number = lane % 2 ? words[lane / 2] >> 16 : words[lane / 2] & 0xffff;
    return number >= problem.dropout_threshold ? problem.dropout_scale() : 0.0;
  }
  void poison_outputs() {
    for (Tensor* tensor : {&out, &out_error, &dquery, &dkey, &dvalue}) std::memset(tensor->memory.get(), kGuard, tensor->bytes);
    std::fill(lse.begin(), lse.end(), NAN);
    for (std::vector<float>* sums : {&dattn_mask, &dslopes, &dsinks, &dquery_parts}) std::fill(sums->begin(), sums->end(), 0.0f);
  }
};

using Matrix = std::vector<double>;

struct Expected {  // (B, H, rows, columns), dense
  Matrix out, lse, dquery, dkey, dvalue;
  Matrix dattn_mask, dslopes, dsinks;  // (H, Lq, Lk), (B, H), (B, H)
  Matrix weights, mean_weights;        // after dropout: (B, H, Lq, Lk), (B, Lq, Lk)
};

// The formula, one score at a time.
Expected expect(const Inputs& in) {
  const Case& c = in.c;
  const auto zeros = [&](int64_t rows, int64_t columns) { return Matrix(static_cast<size_t>(c.batch * c.heads * rows * columns), 0.0); };
  Expected e{zeros(c.seqlen_q, c.head_dim_v),
             zeros(c.seqlen_q, 1),
             zeros(c.seqlen_q, c.head_dim_qk),
             zeros(c.seqlen_k, c.head_dim_qk),
             zeros(c.seqlen_k, c.head_dim_v),
             Matrix(static_cast<size_t>(c.heads * c.seqlen_q * c.seqlen_k), 0.0),
             zeros(1, 1),
             zeros(1, 1),
             zeros(c.seqlen_q, c.seqlen_k),
             Matrix(static_cast<size_t>(c.batch * c.seqlen_q * c.seqlen_k), 0.0)};
  const double scale = in.problem.softmax_scale;
  Matrix weights(static_cast<size_t>(c.seqlen_k)), dweights(weights.size()), tanhs(weights.size(), 0.0);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t head = b * c.heads + h, h_kv = in.key_head(h), kv = b * in.problem.num_heads_kv + h_kv;
      const double slope = c.alibi ? in.slopes[static_cast<size_t>(head)] : 0.0;
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        const bool has_sink = c.sinks && in.query_present(b, i);
        const double sink = has_sink ? in.sinks[static_cast<size_t>(h)] : -INFINITY;
        double max = sink, sum = 0, delta = 0;
        for (int64_t j = 0; j < c.seqlen_k; ++j) {
          double score = -INFINITY;
          if (in.visible(b, h, i, j)) {
            score = 0;
            for (int64_t d = 0; d < c.head_dim_qk; ++d) score += static_cast<double>(in.query.get(b, h, i, d)) * in.key.get(b, h_kv, j, d);
            score *= scale;
            if (c.softcap != 0)
              tanhs[static_cast<size_t>(j)] = std::tanh(score / c.softcap), score = c.softcap * tanhs[static_cast<size_t>(j)];
            score += in.bias(h, i, j) - slope * static_cast<double>(std::abs(in.distance(b, i, j)));
          }
          weights[static_cast<size_t>(j)] = score;
          max = std::max(max, score);
        }
        if (max == -INFINITY) {
          e.lse[in.lse_index(b, h, i)] = -INFINITY;
          continue;
        }
        sum = has_sink ? std::exp(sink - max) : 0;
        for (double& weight : weights) sum += weight = std::exp(weight - max);
        e.lse[in.lse_index(b, h, i)] = max + std::log(sum);
        for (int64_t j = 0; j < c.seqlen_k; ++j) {
          double &weight = weights[static_cast<size_t>(j)], &dweight = dweights[static_cast<size_t>(j)];
          weight /= sum, dweight = 0;
          if (weight == 0) continue;
          const double keep = in.keep_factor(b, h, i, j);
          e.weights[static_cast<size_t>((head * c.seqlen_q + i) * c.seqlen_k + j)] = weight * keep;
          e.mean_weights[static_cast<size_t>((b * c.seqlen_q + i) * c.seqlen_k + j)] += weight * keep / static_cast<double>(c.heads);
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            const double v = in.value.get(b, h_kv, j, d), g = in.dout.get(b, h, i, d);
            e.out[static_cast<size_t>((head * c.seqlen_q + i) * c.head_dim_v + d)] += weight * keep * v;
            e.dvalue[static_cast<size_t>((kv * c.seqlen_k + j) * c.head_dim_v + d)] += weight * keep * g;
            dweight += keep * g * v;
          }
          delta += weight * dweight;
        }
        if (c.dlse) delta -= in.dlse[in.lse_index(b, h, i)];
        if (has_sink) e.dsinks[static_cast<size_t>(head)] -= std::exp(sink - e.lse[in.lse_index(b, h, i)]) * delta;
        for (int64_t j = 0; j < c.seqlen_k; ++j) {
          if (weights[static_cast<size_t>(j)] == 0) continue;
          const double dbias = weights[static_cast<size_t>(j)] * (dweights[static_cast<size_t>(j)] - delta);
          const double slope_of_cap = 1.0 - tanhs[static_cast<size_t>(j)] * tanhs[static_cast<size_t>(j)];
          const double dscore = dbias * scale * (c.softcap != 0 ? slope_of_cap : 1.0);
          e.dattn_mask[static_cast<size_t>((h * c.seqlen_q + i) * c.seqlen_k + j)] += dbias;
          e.dslopes[static_cast<size_t>(head)] -= dbias * static_cast<double>(std::abs(in.distance(b, i, j)));
          for (int64_t d = 0; d < c.head_dim_qk; ++d) {
            e.dquery[static_cast<size_t>((head * c.seqlen_q + i) * c.head_dim_qk + d)] += dscore * in.key.get(b, h_kv, j, d);
            e.dkey[static_cast<size_t>((kv * c.seqlen_k + j) * c.head_dim_qk + d)] += dscore * in.query.get(b, h, i, d);
          }
        }
      }
    }
  }
  return e;
}

// A coarse bound, here to catch a wrong index or mask, in units in the last place of the largest value: float16 16, bfloat16 8, float32
// 32 (the 16 that the accuracy rule allows in itself and as much for what it adds by plain PyTorch's own error). The Python tests judge
// rounding.
double tolerance(const AttentionProblem& problem, Dtype dtype) {
  if (dtype == Dtype::float32) return problem.bf16x3 ? 1e-4 : 3.8e-6;
  return dtype == Dtype::float16 ? 16.0 / 2048 : 8.0 / 256;
}

[[noreturn]] void fail(const char* isa, const Inputs& in, const std::string& what) {
  const Case& c = in.c;
  std::printf("FAILED %s dtype %d B%lld H%lld Lq%lld Lk%lld Dqk%lld Dv%lld causal %d: %s\n", isa, static_cast<int>(in.problem.dtype),
              static_cast<long long>(c.batch), static_cast<long long>(c.heads), static_cast<long long>(c.seqlen_q),
              static_cast<long long>(c.seqlen_k), static_cast<long long>(c.head_dim_qk), static_cast<long long>(c.head_dim_v),
              static_cast<int>(c.causal), what.c_str());
  std::exit(1);
}

void compare(const char* isa, const Inputs& in, const char* name, const Tensor& got, const Matrix& want) {
  double largest = 1.0;
  for (double value : want) largest = std::max(largest, std::fabs(value));
  size_t index = 0;
  for (int64_t b = 0; b < got.batch; ++b)
    for (int64_t h = 0; h < got.heads; ++h)
      for (int64_t r = 0; r < got.rows; ++r)
        for (int64_t d = 0; d < got.columns; ++d, ++index)
          if (!(std::fabs(got.get(b, h, r, d) - want[index]) <= tolerance(in.problem, got.dtype) * largest))
            fail(isa, in,
                 std::string(name) + " at (" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(r) + ", " +
                     std::to_string(d) + "): got " + std::to_string(got.get(b, h, r, d)) + ", want " + std::to_string(want[index]));
  if (!got.gaps_untouched()) fail(isa, in, std::string(name) + ": memory outside the tensor was written");
}

// Sums of `parts` arrays of want.size() numbers, `stride` apart, their elements `step` apart.
void compare_sums(const char* isa, const Inputs& in, const char* name, const std::vector<float>& got, size_t parts, size_t stride,
                  size_t step, const Matrix& want) {
  if (got.empty()) return;
  double largest = 1.0;
  for (double value : want) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    double sum = 0;
    for (size_t part = 0; part < parts; ++part) sum += got[part * stride + i * step];
    if (!(std::fabs(sum - want[i]) <= 4 * tolerance(in.problem, in.problem.dtype) * largest))  // of inputs that cancel
      fail(isa, in, std::string(name) + " " + std::to_string(i) + ": got " + std::to_string(sum) + ", want " + std::to_string(want[i]));
  }
}

// dquery of keys whose parts were tasks is what the caller adds up and scales.
void add_dquery_parts(Inputs& in) {
  const Case& c = in.c;
  const size_t part = static_cast<size_t>(c.batch * c.heads * c.seqlen_q * c.head_dim_qk);
  size_t index = 0;
  for (int64_t b = 0; c.part_tasks && b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.seqlen_q; ++i)
        for (int64_t d = 0; d < c.head_dim_qk; ++d, ++index) {
          float sum = 0;
          for (int32_t n = 0; n < in.problem.num_key_parts; ++n) sum += in.dquery_parts[static_cast<size_t>(n) * part + index];
          in.dquery.set(b, h, i, d, sum * in.problem.softmax_scale);
        }
}

void compare_lse(const char* isa, const Inputs& in, const Expected& want) {
  const double absolute = in.problem.bf16x3 ? 1e-4 : 1e-5;
  for (size_t i = 0; i < want.lse.size(); ++i)
    if (!(std::isinf(want.lse[i]) ? in.lse[i] == want.lse[i]
                                  : std::fabs(in.lse[i] - want.lse[i]) <= absolute + 2e-6 * std::fabs(want.lse[i])))
      fail(isa, in, "lse " + std::to_string(i) + ": got " + std::to_string(in.lse[i]) + ", want " + std::to_string(want.lse[i]));
}

void check(const char* isa, Inputs& in, const Expected& want) {
  add_dquery_parts(in);
  const size_t parts = static_cast<size_t>(in.problem.num_key_parts);
  compare_sums(isa, in, "dattn_mask", in.dattn_mask, static_cast<size_t>(in.problem.num_mask_parts), want.dattn_mask.size(), 1,
               want.dattn_mask);
  compare_sums(isa, in, "dalibi_slopes", in.dslopes, parts, 1, parts, want.dslopes);
  compare_sums(isa, in, "dsinks", in.dsinks, 1, 1, 1, want.dsinks);
  compare(isa, in, "out", in.out, want.out);
  compare(isa, in, "dquery", in.dquery, want.dquery);
  compare(isa, in, "dkey", in.dkey, want.dkey);
  compare(isa, in, "dvalue", in.dvalue, want.dvalue);
  compare_lse(isa, in, want);
}

// In two ranges of tasks, each with scratch memory of exactly the planned size that starts as NaN.
void run_in_ranges(const cpu::Kernel& kernel, const AttentionProblem& problem) {
  const cpu::Plan plan = kernel.plan(problem, 2);
  const int64_t cuts[] = {0, plan.num_tasks / 2, plan.num_tasks};
  for (int range = 0; range < 2; ++range) {
    if (cuts[range] == cuts[range + 1]) continue;
    const size_t bytes = (plan.scratch_bytes + 63) / 64 * 64;
    std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
    std::memset(scratch.get(), kGuard, bytes);
    kernel.run(problem, plan, cuts[range], cuts[range + 1], scratch.get());
  }
}

// The weights of each head and their mean, from the lse that the forward pass wrote; packed sequences have none.
void check_weights(const cpu::KernelTable& table, const Inputs& in, const Expected& want) {
  const Case& c = in.c;
  for (const bool average_heads : {false, true}) {
    Tensor weights(in.problem.dtype, c.batch, average_heads ? std::min<int64_t>(c.heads, 1) : c.heads, c.seqlen_q, c.seqlen_k, gaps);
    AttentionProblem problem = in.problem;
    problem.out = weights.view, problem.average_heads = average_heads;
    if (c.heads == 0) continue;
    run_in_ranges(table.weights[static_cast<int>(problem.dtype)], problem);
    compare(table.name, in, average_heads ? "mean weights" : "weights", weights, average_heads ? want.mean_weights : want.weights);
  }
}

// out, lse and the mean of the weights in one pass.
void check_forward_with_weights(const cpu::KernelTable& table, Inputs& in, const Expected& want) {
  const Case& c = in.c;
  in.poison_outputs();
  Tensor mean(Dtype::float32, c.batch, 1, c.seqlen_q, c.seqlen_k, heads_first);
  AttentionProblem problem = in.problem;
  problem.mean_weights = static_cast<float*>(mean.view.data);
  run_in_ranges(table.forward_with_weights, problem);
  compare(table.name, in, "out", in.out, want.out);
  compare_lse(table.name, in, want);
  compare(table.name, in, "mean weights", mean, want.mean_weights);
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (const Case& spec : kCases) {
      if (spec.seqlen_q > 1000 && dtype != Dtype::float32) continue;  // takes long here
      Inputs in(spec, dtype);
      const Expected want = expect(in);
      for (const cpu::KernelTable* table : cpu::available_tables()) {
        in.poison_outputs();
        run_in_ranges(table->forward[static_cast<int>(dtype)], in.problem);
        run_in_ranges(table->backward[static_cast<int>(dtype)], in.problem);
        check(table->name, in, want);
        if (in.problem.out_error.data) compare(table->name, in, "out_error", in.out_error, Matrix(want.out.size()));
        if (!spec.packed) check_weights(*table, in, want);
        if (!spec.packed && dtype == Dtype::float32 && spec.seqlen_k <= 512 && spec.heads > 0) check_forward_with_weights(*table, in, want);
        in.poison_outputs();
        setenv("FUSED_ATTENTION_CPU_ISA", table->name, 1);
        AttentionProblem of_stored_out = in.problem;
        of_stored_out.out_error.data = nullptr;
        cpu::forward(of_stored_out, 2);
        cpu::backward(of_stored_out, 2);
        check(table->name, in, want);
        if (dtype != Dtype::float32 || !table->forward_bf16x3.run) continue;
        in.poison_outputs();
        in.problem.bf16x3 = true;
        run_in_ranges(table->forward_bf16x3, in.problem);
        run_in_ranges(table->backward_bf16x3, in.problem);
        check(table->name, in, want);
        in.problem.bf16x3 = false;
      }
    }
  }
  for (const cpu::KernelTable* table : cpu::available_tables()) std::printf("%s ok: %zu problems\n", table->name, std::size(kCases));
  return 0;
}
