// SPDX-License-Identifier: Apache-2.0
// The one argument of every native backend: plain data, no ownership, no Python, no torch.
//
//   s   = softmax_scale * Q K^T + attn_mask          (B, H, Lq, Lk)
//   P   = softmax(s), masked entries exactly 0
//   out = dropout(P) V,  lse = log(sum(exp(s)))      natural logarithm
//
// Strides are in elements and int64; the last dimension of every tensor is contiguous. A broadcast dimension has stride 0.
#pragma once
#include <cstdint>

namespace fused_attention {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Causal : int { none = 0, top_left = 1, bottom_right = 2 };

struct StridedTensor {  // element (b, h, row, d) lies at data + b * batch + h * head + row * row + d
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct AttentionProblem {
  Dtype dtype = Dtype::float32;  // of query, key, value, out and their gradients
  int64_t batch = 0, num_heads = 0, seqlen_q = 0, seqlen_k = 0, head_dim_qk = 0, head_dim_v = 0;
  float softmax_scale = 1.0f;  // finite and > 0
  Causal causal = Causal::none;

  StridedTensor query;   // (B, H, Lq, Dqk)
  StridedTensor key;     // (B, H, Lk, Dqk)
  StridedTensor value;   // (B, H, Lk, Dv)
  StridedTensor out;     // (B, H, Lq, Dv): written by the forward, read by the backward
  float* lse = nullptr;  // (B, H, Lq) contiguous: written by the forward, read by the backward

  StridedTensor attn_mask;            // (B, H, Lq, Lk) float32, added to the scaled scores; values below -1e30 mask; data may be null
  const uint8_t* key_mask = nullptr;  // (B, Lk), 1 = may attend; may be null
  int64_t key_mask_batch = 0, key_mask_key = 0;
  const int32_t* key_lengths = nullptr;    // (B,) contiguous, clamped to [0, Lk] when read; may be null
  const int32_t* query_lengths = nullptr;  // (B,) contiguous, clamped to [0, Lq] when read; may be null

  // A weight is kept when its 16-bit number >= dropout_threshold; 0 = no dropout, 65536 = nothing is kept (and nothing drawn).
  uint32_t dropout_threshold = 0;
  const int64_t* rng_state = nullptr;  // (2,) seed, offset; read by the kernel through this pointer; null when threshold is 0 or 65536

  // Backward only.
  StridedTensor dout;                  // (B, H, Lq, Dv)
  const float* dlse = nullptr;         // (B, H, Lq) contiguous, may be null
  StridedTensor dquery, dkey, dvalue;  // every element is written, with 0 where there is no gradient

  // Always inline: a shared copy, compiled for one instruction set, must not serve the others.
  __attribute__((always_inline)) float dropout_scale() const {
    return dropout_threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - dropout_threshold);
  }
};

}  // namespace fused_attention
