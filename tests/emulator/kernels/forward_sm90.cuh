// A warp-specialised FlashAttention forward kernel for Hopper to seed bugs in: bf16, head dim 64.
// Warpgroup 0 loads by TMA (one elected thread); warpgroups 1 and up compute 64 query rows each.
// Tensor maps of q, k, v, o: (batch * heads, seqlen, 64), box (1, 64, 64), 128-byte swizzle. lse: (batch * heads, seqlen).
// S = Q K^T takes both operands from shared memory, O = P V takes P from registers and V as it lies (MN-major).
#pragma once
#include "ptx.cuh"
#include "seeded_bug.h"

namespace forward_sm90 {
constexpr int BLOCK_N = 64, HEAD_DIM = 64, STAGES = 2, TILE_BYTES = 64 * 64 * 2;
template <int NUM_CONSUMERS>
struct Config {
  static constexpr int BLOCK_M = 64 * NUM_CONSUMERS, NUM_THREADS = 128 * (NUM_CONSUMERS + 1);
  static constexpr int SMEM = TILE_BYTES * (NUM_CONSUMERS + 2 * STAGES) + 256;
};

// S(64x64) = Q(64x64) K^T: 4 k-steps of 16; descriptors advance 32 bytes inside the 128-byte swizzle row
template <Bug BUG>
PTX_FN void issue_qk(float (&s)[32], uint32_t sq, uint32_t sk) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    ptx::wgmma_m64n64k16_ss<0, 0>(s, ptx::wgmma_desc(sq + kk * 32, 16, 1024, 1),
                                  ptx::wgmma_desc(sk + kk * 32, 16, BUG == Bug::WRONG_DESCRIPTOR_STRIDE ? 512 : 1024, 1), kk != 0);
}
// O(64x64) += P(64x64, registers) V(64 keys x 64): V is N-contiguous, 16 keys = 2 swizzle atoms of 8 rows
PTX_FN void issue_pv(float (&o)[32], const uint32_t (&p)[4][4], uint32_t sv, bool acc) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) ptx::wgmma_m64n64k16_rs<1>(o, p[kk], ptx::wgmma_desc(sv + kk * 2048, 8192, 1024, 1), acc || kk != 0);
}

template <Bug BUG, int NUM_CONSUMERS, bool CAUSAL>
__device__ __forceinline__ void forward(const TensorMap& mq, const TensorMap& mk, const TensorMap& mv, const TensorMap& mo,
                                        float* __restrict__ lse, int seqlen, float scale_log2) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int tid = threadIdx.x, wg = tid >> 7, warp = tid >> 5, lane = tid & 31;
  const int first_row = blockIdx.x * Config<NUM_CONSUMERS>::BLOCK_M, bh = blockIdx.y;
  const uint32_t q_smem = ptx::smem_u32(smem), k_smem = q_smem + NUM_CONSUMERS * TILE_BYTES, v_smem = k_smem + STAGES * TILE_BYTES,
                 bars = v_smem + STAGES * TILE_BYTES;
  const uint32_t q_full = bars, k_full = bars + 8, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
                 v_empty = v_full + 8 * STAGES;
  const int key_end = CAUSAL ? min(seqlen, first_row + Config<NUM_CONSUMERS>::BLOCK_M) : seqlen,
            n_tiles = (key_end + BLOCK_N - 1) / BLOCK_N;

  if (tid == 0) {
    ptx::mbar_init(q_full, 1);
    for (int s = 0; s < STAGES; ++s) {
      ptx::mbar_init(k_full + 8 * s, 1);
      ptx::mbar_init(v_full + 8 * s, 1);
      ptx::mbar_init(k_empty + 8 * s, BUG == Bug::EMPTY_BARRIER_COUNT ? 128 * NUM_CONSUMERS : NUM_CONSUMERS);
      ptx::mbar_init(v_empty + 8 * s, NUM_CONSUMERS);
    }
    if (BUG != Bug::NO_FENCE_MBARRIER_INIT) ptx::fence_mbar_init();
  }
  if (BUG != Bug::NO_BARRIER_AFTER_MBARRIER_INIT) ptx::syncthreads();

  if (wg == 0) {
    // ------------------------------------------------------------------ producer
    if (NUM_CONSUMERS > 1 && BUG != Bug::NO_SETMAXNREG_DEC) ptx::setmaxnreg_dec<40>();
    if (warp == 0 && ptx::elect_one()) {
      ptx::mbar_arrive_expect_tx(q_full, BUG == Bug::EXPECT_TX_OF_ONE_LOAD ? TILE_BYTES : NUM_CONSUMERS * TILE_BYTES);
      for (int i = 0; i < NUM_CONSUMERS; ++i) ptx::tma_load_3d(q_smem + i * TILE_BYTES, &mq, q_full, 0, first_row + i * 64, bh);
      for (int j = 0; j < n_tiles; ++j) {
        const int s = j % STAGES;
        const uint32_t ph = (j / STAGES) & 1;
        if (BUG != Bug::NO_WAIT_FOR_EMPTY_SLOT) ptx::mbar_wait(k_empty + 8 * s, ph ^ 1);
        ptx::mbar_arrive_expect_tx(k_full + 8 * s, BUG == Bug::EXPECT_TX_TOO_SMALL   ? TILE_BYTES / 2
                                                   : BUG == Bug::EXPECT_TX_TOO_LARGE ? TILE_BYTES * 2
                                                                                     : TILE_BYTES);
        ptx::tma_load_3d(k_smem + s * TILE_BYTES, &mk, k_full + 8 * s, 0, j * BLOCK_N, bh);
        ptx::mbar_wait(v_empty + 8 * s, ph ^ 1);
        ptx::mbar_arrive_expect_tx(v_full + 8 * s, TILE_BYTES);
        ptx::tma_load_3d(v_smem + s * TILE_BYTES, &mv, v_full + 8 * s, 0, j * BLOCK_N, bh);
      }
    }
  } else {
    // ------------------------------------------------------------------ consumers
    if (NUM_CONSUMERS > 1) ptx::setmaxnreg_inc<232>();
    const int cw = wg - 1, wrow = (warp & 3) * 16 + (lane >> 2);  // this thread: rows wrow, wrow + 8 of its 64
    const uint32_t sq = q_smem + cw * TILE_BYTES;
    const int row0 = first_row + cw * 64 + wrow;
    float o[32] = {}, s[32], row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f}, corr[2];
    uint32_t p[4][4];

    auto softmax = [&](int j) {
      const int first_key = j * BLOCK_N;
      if (BUG != Bug::NO_TAIL_MASK && (first_key + BLOCK_N > seqlen || (CAUSAL && first_key + BLOCK_N > first_row + cw * 64))) {
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          int col = first_key + (e >> 2) * 8 + (lane & 3) * 2 + (e & 1), row = row0 + ((e >> 1) & 1) * 8;
          if (col >= seqlen || (CAUSAL && col > row)) s[e] = -INFINITY;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float mx = row_max[h];
#pragma unroll
        for (int n = 0; n < 8; ++n) mx = fmaxf(mx, fmaxf(s[n * 4 + 2 * h], s[n * 4 + 2 * h + 1]));
        mx = fmaxf(mx, ptx::shfl_xor(mx, 1));
        mx = fmaxf(mx, ptx::shfl_xor(mx, 2));
        const float base = mx == -INFINITY ? 0.f : mx * scale_log2;
        corr[h] = ptx::ex2(row_max[h] * scale_log2 - base);
        row_max[h] = mx;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[n * 4 + 2 * h + e];
            x = ptx::ex2(fmaf(x, scale_log2, -base));
            sum += x;
          }
        row_sum[h] = row_sum[h] * corr[h] + sum;
      }
    };
    auto pack = [&] {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int e = (2 * kk + (i >> 1)) * 4 + (i & 1) * 2;
          p[kk][i] = ptx::pack_bf16(s[e], s[e + 1]);
        }
    };
    auto touch_p = [&] {
      for (int kk = 0; kk < 4; ++kk) ptx::wgmma_touch(p[kk]);
    };
    auto release = [&](uint32_t bar) {
      if ((tid & 127) == 0) ptx::mbar_arrive(bar);
    };

    ptx::mbar_wait(q_full, 0);
    ptx::mbar_wait(k_full, BUG == Bug::WRONG_PARITY ? 1 : 0);
    if (BUG != Bug::NO_WGMMA_FENCE) ptx::wgmma_fence();
    issue_qk<BUG>(s, sq, k_smem);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(s);
    release(k_empty);
    softmax(0);
    pack();
    for (int j = 1; j < n_tiles; ++j) {
      const int sk = j % STAGES, sv = (j - 1) % STAGES;
      ptx::mbar_wait(k_full + 8 * sk, (j / STAGES) & 1);
      ptx::wgmma_touch(s);
      ptx::wgmma_touch(o);
      touch_p();
      ptx::wgmma_fence();
      issue_qk<BUG>(s, sq, k_smem + sk * TILE_BYTES);  // group A: S_j
      ptx::wgmma_commit();
      if (BUG != Bug::NO_WAIT_FOR_V) ptx::mbar_wait(v_full + 8 * sv, ((j - 1) / STAGES) & 1);
      ptx::wgmma_fence();                               // directly before the batch: after a wait loop ptxas would insert its own
      issue_pv(o, p, v_smem + sv * TILE_BYTES, j > 1);  // group B: O += P_{j-1} V_{j-1}
      ptx::wgmma_commit();
      if (BUG == Bug::V_RELEASED_BEFORE_WGMMA_WAIT) release(v_empty + 8 * sv);
      ptx::wgmma_wait<1>();  // S_j ready, PV still running
      ptx::wgmma_touch(s);
      release(k_empty + 8 * sk);
      softmax(j);
      ptx::wgmma_wait<0>();
      ptx::wgmma_touch(o);
      if (BUG != Bug::V_RELEASED_BEFORE_WGMMA_WAIT) release(v_empty + 8 * sv);
#pragma unroll
      for (int e = 0; e < 32; ++e) o[e] *= corr[(e >> 1) & 1];
      pack();
    }
    const int sv = (n_tiles - 1) % STAGES;
    ptx::mbar_wait(v_full + 8 * sv, ((n_tiles - 1) / STAGES) & 1);
    ptx::wgmma_touch(o);
    touch_p();
    ptx::wgmma_fence();
    issue_pv(o, p, v_smem + sv * TILE_BYTES, n_tiles > 1);
    ptx::wgmma_commit();
    if (BUG != Bug::NO_WGMMA_WAIT) ptx::wgmma_wait<0>();
    ptx::wgmma_touch(o);

    // epilogue: normalise, bf16, into this warpgroup's Q tile (same 128B swizzle), TMA store
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum[h] += ptx::shfl_xor(row_sum[h], 1);
      row_sum[h] += ptx::shfl_xor(row_sum[h], 2);
      const float inv = row_sum[h] > 0.f ? 1.f / row_sum[h] : 0.f;
      const int r = wrow + h * 8;
#pragma unroll
      for (int n = 0; n < 8; ++n)
        *reinterpret_cast<uint32_t*>(smem + cw * TILE_BYTES + r * 128 + ((n ^ (r & 7)) << 4) + (lane & 3) * 4) =
            ptx::pack_bf16(o[n * 4 + 2 * h] * inv, o[n * 4 + 2 * h + 1] * inv);
      if ((lane & 3) == 0 && row0 + h * 8 < seqlen)
        lse[(size_t)bh * seqlen + row0 + h * 8] = row_max[h] * scale_log2 * 0.69314718056f + logf(row_sum[h]);
    }
    if (BUG != Bug::NO_PROXY_FENCE_BEFORE_STORE && BUG != Bug::PROXY_FENCE_AFTER_BARRIER) ptx::fence_proxy_async();
    if (BUG != Bug::NO_BARRIER_BEFORE_STORE) ptx::bar_sync(1 + cw, BUG == Bug::BARRIER_COUNT ? 256 : 128);
    if ((warp & 3) == 0 && ptx::elect_one()) {
      if (BUG == Bug::PROXY_FENCE_AFTER_BARRIER) ptx::fence_proxy_async();
      ptx::tma_store_3d(&mo, sq, 0, first_row + cw * 64, bh);
      ptx::bulk_commit();
      if (BUG != Bug::NO_BULK_WAIT) ptx::bulk_wait_read<0>();
    }
  }
}
}  // namespace forward_sm90
