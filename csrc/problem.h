// SPDX-License-Identifier: Apache-2.0
// The one argument of every native backend: plain data, no ownership, no Python, no torch.
//
//   s   = softmax_scale * Q K^T                                      (B, Hq, Lq, Lk)
//   s   = softcap * tanh(s / softcap) where there is a softcap
//   s  += attn_mask - alibi_slope * |j - i - offset|                 0 on the diagonal
//   P   = softmax(s), masked entries exactly 0; exp(sink) is added to the denominator
//   out = dropout(P) V,  lse = log(sum(exp(s)) + exp(sink))          natural logarithm
//
// Strides are in elements and int64; the last dimension of every tensor is contiguous unless it has a stride of its own. A broadcast
// dimension has stride 0. Members that a backend does not cover are refused before it runs (unsupported_reasons in Python).
#pragma once
#include <cstdint>

namespace fused_attention {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
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

// The key tiles of 64 that a block of rows visits. Line (b, h, i) is [number of full tiles, number of mixed ones, the full ones
// ascending, ..., the mixed ones descending], num_tiles places after the two numbers.
struct TileLists {
  const int32_t* data = nullptr;
  int64_t batch = 0, head = 0, line = 0;
  int32_t num_tiles = 0;
};

struct AttentionProblem {
  Dtype dtype = Dtype::float32;  // of query, key, value, out and their gradients
  int64_t batch = 0, num_heads = 0, seqlen_q = 0, seqlen_k = 0, head_dim_qk = 0, head_dim_v = 0;
  int64_t num_heads_kv = 0;    // Hkv, a divisor of num_heads: query head h reads key and value head h / (num_heads / num_heads_kv)
  float softmax_scale = 1.0f;  // finite and > 0
  int32_t window_left = kUnlimited, window_right = kUnlimited;  // keys visible to each side of the diagonal: causal sees 0 to the right
  int32_t diagonal = 0;                                         // which runs through j = i + this,
  bool bottom_right = false;                                    // + keys present - rows present of each sequence
  float softcap = 0.0f;                                         // 0 = none

  StridedTensor query;   // (B, Hq, Lq, Dqk)
  StridedTensor key;     // (B, Hkv, Lk, Dqk)
  StridedTensor value;   // (B, Hkv, Lk, Dv)
  StridedTensor out;     // (B, Hq, Lq, Dv): written by the forward, read by the backward
  float* lse = nullptr;  // (B, Hq, Lq) contiguous: written by the forward, read by the backward

  // Packed sequences: query is (1, Hq, Tq, Dqk), out and lse likewise, key and value (1, Hkv, Tk, ...); batch is the number of sequences,
  // seqlen_q and seqlen_k bound the longest. Sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Both null otherwise.
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

  // A PreparedMask (kernels/prepared_mask.py), which already says everything about causal, window, lengths and masks; may be null.
  BitMask mask_bits;    // bit j % 32 of word j / 32 of a line is 1 when the query may attend to key j
  TileLists row_tiles;  // of blocks of 64 rows

  // A weight is kept when its 16-bit number >= dropout_threshold; 0 = no dropout, 65536 = nothing is kept (and nothing drawn).
  uint32_t dropout_threshold = 0;
  const int64_t* rng_state = nullptr;  // (2,) seed, offset; read by the kernel through this pointer; null when threshold is 0 or 65536

  // Backward only.
  StridedTensor dout;                  // (B, H, Lq, Dv)
  const float* dlse = nullptr;         // (B, H, Lq) contiguous, may be null
  StridedTensor dquery, dkey, dvalue;  // every element is written, with 0 where there is no gradient

  bool average_heads = false;  // of attention_weights on the CPU, whose weights (B, Hq or 1, Lq, Lk) go to `out`

  // Backward on the CPU only. The gradients of what masks and biases, in float32 parts that the caller adds up; null = not wanted.
  // The caller clears them. A packed batch leaves rows of no sequence alone.
  float* dattn_mask = nullptr;  // (num_mask_parts, B or 1, Hq or 1, Lq or 1, Lk or 1): a task adds to one part
  int64_t dattn_mask_part = 0, dattn_mask_batch = 0, dattn_mask_head = 0, dattn_mask_row = 0, dattn_mask_key = 0;
  int32_t num_mask_parts = 1;      // into how many parts the heads that share one slice of the mask are dealt
  float* dalibi_slopes = nullptr;  // (B, Hq, num_key_splits)
  float* dsinks = nullptr;         // (B, Hq, num_key_splits)
  int32_t num_key_splits = 1;      // the keys of a head are split among so many tasks
  float* dquery_parts = nullptr;   // (num_key_splits, B, Hq, Lq, Dqk) instead of dquery when there are several

  // Always inline: a shared copy, compiled for one instruction set, must not serve the others.
  __attribute__((always_inline)) float dropout_scale() const {
    return dropout_threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - dropout_threshold);
  }
};

}  // namespace fused_attention
