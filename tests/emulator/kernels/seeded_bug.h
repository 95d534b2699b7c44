// The defects that the emulator must catch. Each is one wrong line in a kernel that is right with NONE.
#pragma once

enum class Bug {
  NONE,
  // forward_sm80.cuh
  NO_CP_ASYNC_WAIT,           // tiles read before their copies are known to have landed
  NO_BARRIER_AFTER_CP_ASYNC,  // tiles read before other threads' copies have landed
  NO_SYNCWARP_IN_EPILOGUE,    // output staged in shared memory
  PREFETCH_INTO_LIVE_BUFFER,  // the next K over the current one
  TAIL_ROWS_NOT_CLAMPED,      // reads beyond the end of the arrays
  TAIL_ROWS_STORED,           // writes beyond the end of the arrays
  // forward_sm90.cuh
  NO_WAIT_FOR_V,                   // consumers do not wait for V's full barrier
  NO_PROXY_FENCE_BEFORE_STORE,     // no fence.proxy.async before the TMA store
  WRONG_PARITY,                    // of the phase of K's full barrier
  EXPECT_TX_TOO_SMALL,             // half the bytes of K
  EXPECT_TX_TOO_LARGE,             // twice the bytes of K
  V_RELEASED_BEFORE_WGMMA_WAIT,    // while wgmma still reads it
  NO_WGMMA_WAIT,                   // accumulators read without wgmma.wait_group
  NO_WGMMA_FENCE,                  // before the first wgmma
  NO_BARRIER_BEFORE_STORE,         // between writing the output tile and its TMA store
  NO_WAIT_FOR_EMPTY_SLOT,          // the producer overwrites K
  EMPTY_BARRIER_COUNT,             // 128 arrivals per consumer, one arrives
  NO_BULK_WAIT,                    // threads exit while TMA reads their output tile
  NO_FENCE_MBARRIER_INIT,          // TMA may not see the mbarriers
  WRONG_DESCRIPTOR_STRIDE,         // of K: wrong numbers
  PROXY_FENCE_AFTER_BARRIER,       // by the storing thread, not by the writing ones
  NO_SETMAXNREG_DEC,               // the producer keeps its registers: none left for the consumers
  BARRIER_COUNT,                   // 256 threads, of which 128 come
  NO_BARRIER_AFTER_MBARRIER_INIT,  // mbarriers used before their initialisation
  NO_TAIL_MASK,                    // keys beyond the end count: wrong numbers
  EXPECT_TX_OF_ONE_LOAD,           // of the two of Q
  // accumulate.cuh
  NO_ACQUIRE,                 // the turn is awaited by relaxed loads
  NO_RELEASE,                 // the turn is passed on by a relaxed addition
  NO_BARRIER_BEFORE_RELEASE,  // the turn is passed on while other threads still add
  SKIPPED_TILE_NOT_COUNTED,   // turns are given to blocks that skip the tile and never come
  SEMAPHORES_NOT_RESET,       // the next launch finds them used
  NO_TICKET,                  // blocks take their work by block index and wait for blocks that may not be resident
  WAIT_GROUP_READ,            // the turn is passed on when shared memory has been read, not when global memory has been written
  NO_PROXY_FENCE,             // between writing a tile in shared memory and its bulk addition
};
