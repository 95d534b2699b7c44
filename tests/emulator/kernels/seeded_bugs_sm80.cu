// forward_sm80.cuh once right and once with each of its bugs; kernels are named after the bug.
#include "forward_sm80.cuh"

#define KERNEL(NAME, BUG, CAUSAL)                                                                                            \
  extern "C" __global__ void __launch_bounds__(forward_sm80::NUM_THREADS)                                                    \
      NAME(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, float* lse, int seqlen, float scale_log2) { \
    forward_sm80::forward<BUG, CAUSAL>(q, k, v, o, lse, seqlen, scale_log2);                                                 \
  }
KERNEL(FORWARD, Bug::NONE, false)
KERNEL(FORWARD_CAUSAL, Bug::NONE, true)
KERNEL(NO_CP_ASYNC_WAIT, Bug::NO_CP_ASYNC_WAIT, false)
KERNEL(NO_BARRIER_AFTER_CP_ASYNC, Bug::NO_BARRIER_AFTER_CP_ASYNC, false)
KERNEL(NO_SYNCWARP_IN_EPILOGUE, Bug::NO_SYNCWARP_IN_EPILOGUE, false)
KERNEL(PREFETCH_INTO_LIVE_BUFFER, Bug::PREFETCH_INTO_LIVE_BUFFER, false)
KERNEL(TAIL_ROWS_NOT_CLAMPED, Bug::TAIL_ROWS_NOT_CLAMPED, false)
KERNEL(TAIL_ROWS_STORED, Bug::TAIL_ROWS_STORED, false)
