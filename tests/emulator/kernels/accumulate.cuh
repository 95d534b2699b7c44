// The sums of a FlashAttention backward, to seed bugs in: every block adds a tile to the float32 accumulators of the query tiles that it
// visits, one block after the other by a semaphore per query tile, so that results repeat bit for bit.
//
// Work is handed out by a ticket: whoever holds a smaller one has started, so that waiting for it ends. Block n starts at query tile
// n * num_tiles / num_blocks, wraps around and skips some tiles; its turn at a tile is its rank among the blocks that visit the tile. The
// last block to finish copies the sums and resets the counters for the next launch.
//
// sums, out: (num_tiles, TILE) float32, sums zero at first. counters: ticket, finished, then a semaphore per query tile; all zero.
#pragma once
#include "ptx.cuh"
#include "seeded_bug.h"

namespace accumulate {
constexpr int NUM_THREADS = 64, TILE = 128;  // elements, of which a thread adds every NUM_THREADS-th

enum class Method { LOAD_AND_STORE, ATOMIC, BULK };

PTX_FN bool visits(int n, int tile) { return (n + 2 * tile) % 3 != 0; }
PTX_FN float contribution(int n, int tile, int i) { return 1.0f / float(1 + (n * 7 + tile * 5 + i) % 23); }  // sums depend on the order

template <Bug BUG>
PTX_FN uint32_t turn_of(int n, int tile) {
  uint32_t turn = 0;
  for (int m = 0; m < n; ++m) turn += BUG == Bug::SKIPPED_TILE_NOT_COUNTED || visits(m, tile);
  return turn;
}

template <Bug BUG>
PTX_FN void wait_for_turn(const uint32_t* semaphore, uint32_t turn) {
  if (BUG == Bug::NO_ACQUIRE) {
    while (ptx::ld_relaxed(semaphore) != turn) continue;
  } else {
    while (ptx::ld_acquire(semaphore) != turn) continue;
  }
}

template <Bug BUG>
PTX_FN void pass_turn_on(uint32_t* semaphore) {
  if (BUG == Bug::NO_RELEASE)
    ptx::red_add_relaxed(semaphore, 1);
  else
    ptx::red_add_release(semaphore, 1);
}

template <Bug BUG, Method METHOD>
PTX_FN void add_tile(float* sums, uint32_t* semaphore, float* tile_smem, int n, int tile) {
  const int tid = threadIdx.x;
  const uint32_t turn = turn_of<BUG>(n, tile);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (METHOD == Method::BULK) {
    for (int i = tid; i < TILE; i += NUM_THREADS) tile_smem[i] = contribution(n, tile, i);
    if (BUG != Bug::NO_PROXY_FENCE) ptx::fence_proxy_async();
    ptx::syncthreads();
    if (tid == 0) {
      wait_for_turn<BUG>(semaphore, turn);
      ptx::bulk_add_f32(sums, ptx::smem_u32(tile_smem), TILE * sizeof(float));
      ptx::bulk_commit();
      if (BUG == Bug::WAIT_GROUP_READ)
        ptx::bulk_wait_read<0>();
      else
        ptx::bulk_wait<0>();
      pass_turn_on<BUG>(semaphore);
    }
    ptx::syncthreads();
    return;
  }
#endif
  if (tid == 0) wait_for_turn<BUG>(semaphore, turn);
  ptx::syncthreads();
  for (int i = tid; i < TILE; i += NUM_THREADS) {
    if (METHOD == Method::ATOMIC)
      ptx::red_add_f32(sums + i, contribution(n, tile, i));
    else
      sums[i] += contribution(n, tile, i);
  }
  if (BUG != Bug::NO_BARRIER_BEFORE_RELEASE) ptx::syncthreads();
  if (tid == 0) pass_turn_on<BUG>(semaphore);
}

template <Bug BUG, Method METHOD>
__device__ __forceinline__ void accumulate(float* sums, float* out, uint32_t* counters, int num_tiles) {
  __shared__ __align__(128) float tile_smem[TILE];
  __shared__ uint32_t from_thread_0;
  const int tid = threadIdx.x;
  uint32_t *const ticket = counters, *const finished = counters + 1, *const semaphores = counters + 2;

  if (tid == 0) from_thread_0 = BUG == Bug::NO_TICKET ? gridDim.x - 1 - blockIdx.x : ptx::atom_add_relaxed(ticket, 1);
  ptx::syncthreads();
  const int n = from_thread_0, first = n * num_tiles / gridDim.x;
  for (int visit = 0; visit < num_tiles; ++visit) {
    const int tile = (first + visit) % num_tiles;
    if (visits(n, tile)) add_tile<BUG, METHOD>(sums + tile * TILE, semaphores + tile, tile_smem, n, tile);
  }

  ptx::syncthreads();
  if (tid == 0) from_thread_0 = ptx::atom_add_acq_rel(finished, 1);
  ptx::syncthreads();
  if (from_thread_0 != gridDim.x - 1) return;
  for (int i = tid; i < num_tiles * TILE; i += NUM_THREADS) out[i] = sums[i];
  const int kept = BUG == Bug::SEMAPHORES_NOT_RESET ? num_tiles : 0;
  for (int i = tid; i < 2 + num_tiles - kept; i += NUM_THREADS) counters[i] = 0;
}
}  // namespace accumulate

#define ACCUMULATE(NAME, BUG, METHOD)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(accumulate::NUM_THREADS) NAME(float* sums, float* out, uint32_t* counters, int num_tiles) { \
    accumulate::accumulate<Bug::BUG, accumulate::Method::METHOD>(sums, out, counters, num_tiles);                                          \
  }
