// forward_sm90.cuh once right and once with each of its bugs; kernels are named after the bug.
#include "forward_sm90.cuh"

#define KERNEL(NAME, BUG, NUM_CONSUMERS, CAUSAL)                                                                          \
  extern "C" __global__ void __launch_bounds__(128 * (NUM_CONSUMERS + 1), 1)                                              \
      NAME(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
           const __grid_constant__ TensorMap o, float* lse, int seqlen, float scale_log2) {                               \
    forward_sm90::forward<BUG, NUM_CONSUMERS, CAUSAL>(q, k, v, o, lse, seqlen, scale_log2);                               \
  }
KERNEL(FORWARD, Bug::NONE, 2, false)
KERNEL(FORWARD_CAUSAL, Bug::NONE, 2, true)
KERNEL(FORWARD_ONE_CONSUMER, Bug::NONE, 1, false)
KERNEL(NO_WAIT_FOR_V, Bug::NO_WAIT_FOR_V, 2, false)
KERNEL(NO_PROXY_FENCE_BEFORE_STORE, Bug::NO_PROXY_FENCE_BEFORE_STORE, 2, false)
KERNEL(WRONG_PARITY, Bug::WRONG_PARITY, 2, false)
KERNEL(EXPECT_TX_TOO_SMALL, Bug::EXPECT_TX_TOO_SMALL, 2, false)
KERNEL(EXPECT_TX_TOO_LARGE, Bug::EXPECT_TX_TOO_LARGE, 2, false)
KERNEL(V_RELEASED_BEFORE_WGMMA_WAIT, Bug::V_RELEASED_BEFORE_WGMMA_WAIT, 2, false)
KERNEL(NO_WGMMA_WAIT, Bug::NO_WGMMA_WAIT, 2, false)
KERNEL(NO_WGMMA_FENCE, Bug::NO_WGMMA_FENCE, 2, false)
KERNEL(NO_BARRIER_BEFORE_STORE, Bug::NO_BARRIER_BEFORE_STORE, 2, false)
KERNEL(NO_WAIT_FOR_EMPTY_SLOT, Bug::NO_WAIT_FOR_EMPTY_SLOT, 2, false)
KERNEL(EMPTY_BARRIER_COUNT, Bug::EMPTY_BARRIER_COUNT, 2, false)
KERNEL(NO_BULK_WAIT, Bug::NO_BULK_WAIT, 2, false)
KERNEL(NO_FENCE_MBARRIER_INIT, Bug::NO_FENCE_MBARRIER_INIT, 2, false)
KERNEL(WRONG_DESCRIPTOR_STRIDE, Bug::WRONG_DESCRIPTOR_STRIDE, 2, false)
KERNEL(PROXY_FENCE_AFTER_BARRIER, Bug::PROXY_FENCE_AFTER_BARRIER, 2, false)
KERNEL(NO_SETMAXNREG_DEC, Bug::NO_SETMAXNREG_DEC, 2, false)
KERNEL(BARRIER_COUNT, Bug::BARRIER_COUNT, 2, false)
KERNEL(NO_BARRIER_AFTER_MBARRIER_INIT, Bug::NO_BARRIER_AFTER_MBARRIER_INIT, 2, false)
KERNEL(NO_TAIL_MASK, Bug::NO_TAIL_MASK, 2, false)
KERNEL(EXPECT_TX_OF_ONE_LOAD, Bug::EXPECT_TX_OF_ONE_LOAD, 2, false)
