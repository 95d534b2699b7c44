// CUDA C++ as anybody writes it: static shared memory, shuffles, intrinsics, constants, local arrays, atomics, functions that are not
// inlined.
#include <cstdint>
#include <cuda_bf16.h>

__constant__ int powers_of_three[5] = {1, 3, 9, 27, 81};
__device__ int total;

struct Pair {
  int first;
  float second;
};

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__device__ __noinline__ Pair scaled(Pair p, const float* factor) { return {p.first * 2, p.second * *factor}; }

extern "C" __global__ void functions(int* out) {
  const float factor = 0.5f;
  const Pair p = scaled({int(threadIdx.x), 3.0f}, &factor);
  out[threadIdx.x] = fibonacci(threadIdx.x) * 1000 + p.first * 10 + int(p.second * 2) + powers_of_three[threadIdx.x % 5];
  atomicAdd(&total, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[blockDim.x] = total;
}

// sums: of bf16 numbers reversed within each block of 128, plus a table; most: the largest number of positive ones in a block.
extern "C" __global__ void reversed_sums(const __nv_bfloat16* x, float* sum, int* most, int n) {
  __shared__ float s[128];
  float table[16];
  const int t = threadIdx.x, i = blockIdx.x * 128 + t;
  for (int j = 0; j < 16; ++j) table[j] = j * (t + 1);
  const float mine = i < n ? __bfloat162float(x[i]) : 0.0f;
  s[t] = mine;
  const int positive = __syncthreads_count(mine > 0.0f);
  float v = s[127 - t] + table[(t * 7) & 15];
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  if ((t & 31) == 0) atomicAdd(sum, v);
  if (t == 0) atomicMax(most, positive);
}

// Functions of CUDA's math library, which is PTX that nvcc inlines.
extern "C" __global__ void math_functions(const int* which, float* x) {
  float& y = x[threadIdx.x];
  switch (which[threadIdx.x]) {
    case 0:
      y = sqrtf(y);
      break;
    case 1:
      y = expf(y);
      break;
    case 2:
      y = __expf(y);
      break;
    case 3:
      y = tanhf(y);
      break;
    case 4:
      y = logf(y);
      break;
    case 5:
      y = fmodf(y, 3.0f);
      break;
    case 6:
      y = 1 / y;
      break;
    case 7:
      y = floorf(y / 2);
      break;
    default:
      y = -y;
  }
}
