// SPDX-License-Identifier: Apache-2.0
// The one argument of every native backend: plain data, no ownership, no Python, no torch.
//
//   s   = softmax_scale * Q K^T                                      (B, Hq, Lq, Lk)
//   s   = softcap * tanh(s / softcap)                              if there is a softcap
//   s  += attn_mask - alibi_slope * |j - i - offset|                 0 on the diagonal
//   P   = softmax(s), masked entries exactly 0; exp(sink) is added to the denominator
//   out = dropout(P) V,  lse = log(sum(exp(s)) + exp(sink))          natural logarithm
//
// Strides are int64, in elements; the last dimension of every tensor is contiguous unless it has a stride of its own. A broadcast
// dimension has stride 0. A backend is never handed a member it does not support (unsupported_reasons in Python).
#pragma once
#include <cstdint>

namespace fused_attention {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class CacheDtype : int { none = -1, int8 = 0, float8_e4m3 = 1, float8_e5m2 = 2 };
enum class MaskDtype : int { float32 = 0, bfloat16 = 1, float16 = 2, boolean = 3 };  // boolean: bytes, 1 = may attend

constexpr int32_t kUnlimited = 1 << 30;  // a window side that no sequence reaches; sums with it fit an int32

struct StridedTensor {  // element (b, h, row, d) lies at data + b * batch + h * head + row * row + d
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct BitMask {  // line (b, h, i) of words starts at data + b * batch + h * head + i * line
  const uint32_t* data = nullptr;
  int64_t batch = 0, head = 0, line = 0;
};

// Factors of an 8-bit key or value: that of key j of head (b, h) is data[b * batch + h * head + j / keys * block].
struct BlockScales {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, block = 0;
  int64_t keys = 1;  // in a block
};

// The tiles of 64 keys that a block of rows visits. Line (b, h, i) is [number of full tiles, number of mixed tiles, the full ones
// ascending, ..., the mixed ones descending], with room for num_tiles entries after the two counts.
struct TileLists {
  const int32_t* data = nullptr;
  int64_t batch = 0, head = 0, line = 0;
  int32_t num_tiles = 0;
};

struct AttentionProblem {
  Dtype dtype = Dtype::float32;  // of query, key, value, out and their gradients
  bool bf16x3 = false;           // float32 numbers may be split into two of bfloat16, whose three products are summed; CPU only
  int64_t batch = 0, num_heads = 0, seqlen_q = 0, seqlen_k = 0, head_dim_qk = 0, head_dim_v = 0;
  int64_t num_heads_kv = 0;    // Hkv, a divisor of num_heads: query head h reads key and value head h / (num_heads / num_heads_kv)
  float softmax_scale = 1.0f;  // finite and > 0
  int32_t window_left = kUnlimited, window_right = kUnlimited;  // keys visible on each side of the diagonal; causal: right = 0
  int32_t diagonal = 0;                                         // the diagonal is j = i + this,
  bool bottom_right = false;                                    // plus (keys present - rows present) per sequence
  float softcap = 0.0f;                                         // 0 = none

  StridedTensor query;   // (B, Hq, Lq, Dqk)
  StridedTensor key;     // (B, Hkv, Lk, Dqk)
  StridedTensor value;   // (B, Hkv, Lk, Dv)
  StridedTensor out;     // (B, Hq, Lq, Dv): written by the forward, read by the backward
  float* lse = nullptr;  // (B, Hq, Lq) contiguous: written by the forward, read by the backward
  // What out lost when it was rounded to bfloat16 or float16, in the same dtype, with the strides of out. Written by the CPU's forward and
  // read by its backward; data may be null.
  StridedTensor out_error;

  // The CPU's forward of at most two queries only: key and value of 8 bits, to be multiplied by scales (B, Hkv, blocks). `dtype` is that of
  // query and out.
  CacheDtype cache_dtype = CacheDtype::none;
  BlockScales key_scale, value_scale;

  // Packed sequences: query is (1, Hq, Tq, Dqk), likewise out and lse; key and value are (1, Hkv, Tk, ...). batch counts the sequences,
  // seqlen_q and seqlen_k bound their lengths, and sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Null if not packed.
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // (B + 1,) contiguous, clamped to [0, Tq] and [0, Tk] when read
  int64_t num_tokens_q = 0, num_tokens_k = 0;                      // Tq and Tk

  StridedTensor attn_mask;    // (B, Hq, Lq, Lk) added to the scaled scores; values below -1e30 mask; data may be null
  int64_t attn_mask_key = 1;  // its stride along keys
  MaskDtype attn_mask_dtype = MaskDtype::float32;
  const uint8_t* key_mask = nullptr;  // (B, Lk), 1 = may attend; may be null
  int64_t key_mask_batch = 0, key_mask_key = 0;
  const int32_t* key_lengths = nullptr;    // (B,) contiguous, clamped to [0, Lk] when read; may be null
  const int32_t* query_lengths = nullptr;  // (B,) contiguous, clamped to [0, Lq] when read; may be null

  const float* alibi_slopes = nullptr;  // (B, Hq), may be null
  int64_t alibi_slopes_batch = 0, alibi_slopes_head = 0;
  const float* sinks = nullptr;  // (Hq,) contiguous, may be null

  // A PreparedMask (kernels/prepared_mask.py), which already includes causal, window, lengths and masks; may be null.
  BitMask mask_bits;    // bit j % 32 of word j / 32 of a line is 1 if the query may attend to key j
  TileLists row_tiles;  // one line per block of 64 rows

  // A weight is kept if its 16-bit random number >= dropout_threshold; 0 = no dropout, 65536 = drop everything (nothing is drawn).
  uint32_t dropout_threshold = 0;
  const int64_t* rng_state = nullptr;  // (2,) seed, offset, read by the kernel; null if the threshold is 0 or 65536

  // Backward only.
  StridedTensor dout;                  // (B, H, Lq, Dv)
  const float* dlse = nullptr;         // (B, H, Lq) contiguous, may be null
  StridedTensor dquery, dkey, dvalue;  // every element is written, with 0 where there is no gradient

  bool average_heads = false;     // attention_weights on the CPU only; `out` gets the weights, (B, Hq or 1, Lq, Lk)
  float* mean_weights = nullptr;  // the CPU's forward with weights only: (B, Lq, Lk) contiguous, the mean over heads after dropout

  // CPU backward only. Gradients of the mask and the biases, as float32 parts that the caller zeroes and later sums; null = not wanted.
  // Rows of a packed batch that belong to no sequence are not written.
  // (num_mask_parts, B or 1, Hq or 1, Lq or 1, Lk); a task adds to one part. If the mask has one element for all keys, (num_mask_parts *
  // num_key_parts, ..., 1).
  float* dattn_mask = nullptr;
  int64_t dattn_mask_part = 0, dattn_mask_batch = 0, dattn_mask_head = 0, dattn_mask_row = 0, dattn_mask_key = 0;
  int32_t num_mask_parts = 1;      // the heads that share a slice of the mask are divided among this many parts
  int32_t num_key_parts = 1;       // of the longest sequence: key_parts(seqlen_k) in cpu/kernel_table.h
  float* dalibi_slopes = nullptr;  // (B, Hq, num_key_parts)
  float* dsinks = nullptr;         // (B, Hq)
  float* dquery_parts = nullptr;   // (num_key_parts, B, Hq, Lq, Dqk), not yet scaled, instead of dquery: each part of the keys is a task

  // Always inline: the linker must not share a copy compiled for one instruction set with the others.
  __attribute__((always_inline)) float dropout_scale() const {
    return dropout_threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - dropout_threshold);
  }
};

}  // namespace fused_attention
