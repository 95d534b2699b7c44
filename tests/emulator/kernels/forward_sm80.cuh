// A FlashAttention-2 style forward kernel to seed bugs in: bf16, head dim 64, 64 x 64 tiles, 4 warps, cp.async, ldmatrix, mma.sync.
// q, k, v, o: (batch * heads, seqlen, 64); lse: (batch * heads, seqlen). grid = (ceil(seqlen / 64), batch * heads).
#pragma once
#include "ptx.cuh"
#include "seeded_bug.h"

namespace forward_sm80 {
constexpr int BLOCK_M = 64, BLOCK_N = 64, HEAD_DIM = 64, NUM_THREADS = 128;
constexpr int TILE_BYTES = 64 * HEAD_DIM * 2;  // 8 KiB
constexpr int SMEM_BYTES = TILE_BYTES * 5;     // Q, K x2, V x2

// byte offset of 16-byte chunk c of row r in a 64x64 bf16 tile, XOR swizzled
PTX_FN uint32_t swz(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

// copy 64 rows x 128 B; rows >= seqlen are zero filled
template <Bug BUG>
PTX_FN void load_tile(uint32_t s, const uint16_t* g, int row0, int seqlen, int tid) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int idx = tid + i * NUM_THREADS, r = idx >> 3, c = idx & 7, row = row0 + r;
    bool ok = row < seqlen;
    ptx::cp_async_16(s + swz(r, c), g + (size_t)(ok || BUG == Bug::TAIL_ROWS_NOT_CLAMPED ? row : 0) * HEAD_DIM + c * 8,
                     ok || BUG == Bug::TAIL_ROWS_NOT_CLAMPED ? 16 : 0);
  }
}

template <Bug BUG, bool CAUSAL>
__device__ __forceinline__ void forward(const uint16_t* __restrict__ q, const uint16_t* __restrict__ k, const uint16_t* __restrict__ v,
                                        uint16_t* __restrict__ o, float* __restrict__ lse, int seqlen, float scale_log2) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int first_row = blockIdx.x * BLOCK_M;
  const size_t head = (size_t)blockIdx.y * seqlen;
  q += head * HEAD_DIM;
  k += head * HEAD_DIM;
  v += head * HEAD_DIM;
  o += head * HEAD_DIM;
  lse += head;
  const uint32_t q_smem = ptx::smem_u32(smem), k_smem = q_smem + TILE_BYTES, v_smem = k_smem + 2 * TILE_BYTES;

  const int key_end = CAUSAL ? min(seqlen, first_row + BLOCK_M) : seqlen;
  const int n_tiles = (key_end + BLOCK_N - 1) / BLOCK_N;

  load_tile<BUG>(q_smem, q, first_row, seqlen, tid);
  load_tile<BUG>(k_smem, k, 0, seqlen, tid);
  ptx::cp_async_commit();
  load_tile<BUG>(v_smem, v, 0, seqlen, tid);
  ptx::cp_async_commit();

  uint32_t aq[4][4];
  float acc[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};

  for (int j = 0; j < n_tiles; ++j) {
    const int buf = j & 1;
    // K_j and everything older has landed (V_j may still be in flight)
    if (BUG != Bug::NO_CP_ASYNC_WAIT) ptx::cp_async_wait<1>();
    if (BUG != Bug::NO_BARRIER_AFTER_CP_ASYNC) ptx::syncthreads();
    if (j == 0) {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) ptx::ldmatrix_x4(aq[kk], q_smem + swz(warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
    }
    // S = Q K^T
    float s[8][4] = {};
    const uint32_t k_s = k_smem + buf * TILE_BYTES;
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];  // two n8 blocks x two k8 halves
        ptx::ldmatrix_x4(b, k_s + swz(n * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
        ptx::mma_bf16(s[2 * n], aq[kk], b[0], b[1]);
        ptx::mma_bf16(s[2 * n + 1], aq[kk], b[2], b[3]);
      }
    // prefetch K_{j+1} into the other buffer (free: every warp passed the barrier above)
    if (j + 1 < n_tiles)
      load_tile<BUG>(k_smem + (BUG == Bug::PREFETCH_INTO_LIVE_BUFFER ? buf : buf ^ 1) * TILE_BYTES, k, (j + 1) * BLOCK_N, seqlen, tid);
    ptx::cp_async_commit();
    // mask
    const int first_key = j * BLOCK_N;
    if (first_key + BLOCK_N > seqlen || (CAUSAL && first_key + BLOCK_N > first_row)) {
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int col = first_key + n * 8 + (lane & 3) * 2 + (e & 1), row = first_row + warp * 16 + (lane >> 2) + (e >> 1) * 8;
          if (col >= seqlen || (CAUSAL && col > row)) s[n][e] = -INFINITY;
        }
    }
    // online softmax
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float mx = row_max[h];
#pragma unroll
      for (int n = 0; n < 8; ++n) mx = fmaxf(mx, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      mx = fmaxf(mx, ptx::shfl_xor(mx, 1));
      mx = fmaxf(mx, ptx::shfl_xor(mx, 2));
      const float base = mx == -INFINITY ? 0.f : mx * scale_log2;
      const float corr = ptx::ex2(row_max[h] * scale_log2 - base);
      row_max[h] = mx;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        s[n][2 * h] = ptx::ex2(fmaf(s[n][2 * h], scale_log2, -base));
        s[n][2 * h + 1] = ptx::ex2(fmaf(s[n][2 * h + 1], scale_log2, -base));
        sum += s[n][2 * h] + s[n][2 * h + 1];
        acc[n][2 * h] *= corr;
        acc[n][2 * h + 1] *= corr;
      }
      row_sum[h] = row_sum[h] * corr + sum;
    }
    // O += P V
    ptx::cp_async_wait<1>();  // V_j landed; K_{j+1} may be in flight
    ptx::syncthreads();
    const uint32_t v_s = v_smem + buf * TILE_BYTES;
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t a[4] = {ptx::pack_bf16(s[2 * kk][0], s[2 * kk][1]), ptx::pack_bf16(s[2 * kk][2], s[2 * kk][3]),
                       ptx::pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), ptx::pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v_s + swz(kk * 16 + (lane & 15), n * 2 + (lane >> 4)));
        ptx::mma_bf16(acc[2 * n], a, b[0], b[1]);
        ptx::mma_bf16(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
    if (j + 1 < n_tiles) load_tile<BUG>(v_smem + (buf ^ 1) * TILE_BYTES, v, (j + 1) * BLOCK_N, seqlen, tid);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<0>();
  // epilogue: normalise, stage through this warp's own rows of q_smem, 16-byte stores
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row_sum[h] += ptx::shfl_xor(row_sum[h], 1);
    row_sum[h] += ptx::shfl_xor(row_sum[h], 2);
    const float inv = row_sum[h] > 0.f ? 1.f / row_sum[h] : 0.f;
    const int r = warp * 16 + (lane >> 2) + h * 8;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      *reinterpret_cast<uint32_t*>(smem + swz(r, n) + (lane & 3) * 4) = ptx::pack_bf16(acc[n][2 * h] * inv, acc[n][2 * h + 1] * inv);
    if ((lane & 3) == 0 && first_row + r < seqlen) lse[first_row + r] = row_max[h] * scale_log2 * 0.69314718056f + logf(row_sum[h]);
  }
  if (BUG != Bug::NO_SYNCWARP_IN_EPILOGUE) ptx::syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int r = warp * 16 + i * 4 + (lane >> 3), c = lane & 7;
    if (first_row + r < seqlen || BUG == Bug::TAIL_ROWS_STORED)
      *reinterpret_cast<uint4*>(o + (size_t)(first_row + r) * HEAD_DIM + c * 8) = *reinterpret_cast<const uint4*>(smem + swz(r, c));
  }
}
}  // namespace forward_sm80
