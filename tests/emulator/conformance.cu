// Runs every wrapper of ptx.cuh on integer-valued inputs and writes the results. On a GPU of sm_90 this program records the file once:
//   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a conformance.cu -o conformance && ./conformance conformance_sm90.bin
// The emulator runs the same kernels with the same launches (test_emulator.py) and must give the same bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/ptx.cuh"

extern __shared__ __align__(1024) unsigned char smem[];

PTX_FN uint32_t hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
PTX_FN float small_integer(uint32_t x) { return (float)((int)(hash(x) % 9) - 4); }
PTX_FN uint32_t pair(uint32_t x) { return ptx::pack_bf16(small_integer(2 * x), small_integer(2 * x + 1)); }

// mma, ldmatrix, stmatrix, shuffles, votes, rounding to bf16, cp.async with zero fill. out: 64 words per thread, then 4096 of input.
extern "C" __global__ void conformance_warp(uint32_t* out) {
  const int t = threadIdx.x;
  const uint32_t s = ptx::smem_u32(smem);
  uint32_t* o = out + t * 64;
  uint32_t r[4], a[4];
  float d[4];
  int n = 0;
  for (int i = 0; i < 4; ++i) {
    a[i] = pair(t * 4 + i);
    d[i] = small_integer(9000 + t * 4 + i);
  }
  ptx::mma_bf16(d, a, pair(500 + t), pair(700 + t));
  for (int i = 0; i < 4; ++i) o[n++] = (uint32_t)(int)d[i];

  for (int j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(smem)[t * 8 + j] = t * 8 + j;
  ptx::syncwarp();
  ptx::ldmatrix_x4(r, s + t * 16);
  for (int i = 0; i < 4; ++i) o[n++] = r[i];
  ptx::ldmatrix_x4_trans(r, s + (t ^ 5) * 16);
  for (int i = 0; i < 4; ++i) o[n++] = r[i];
  ptx::syncwarp();
  for (int i = 0; i < 4; ++i) a[i] = t * 4 + i;
  ptx::stmatrix_x4(s + t * 16, a);
  ptx::syncwarp();
  for (int i = 0; i < 4; ++i) o[n++] = reinterpret_cast<uint32_t*>(smem)[t * 4 + i];
  ptx::syncwarp();

  o[n++] = ptx::shfl_xor((uint32_t)t, 9);
  o[n++] = ptx::shfl_idx(t * 3, 7);
  o[n++] = ptx::ballot(hash(t) & 1);
  o[n++] = ptx::pack_bf16(1.00390625f + t * 0.0078125f * 1.5f, -t * 0.3f);

  ptx::cp_async_16(s + t * 16, out + 4096 + t * 4, t & 1 ? 16 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::syncwarp();
  for (int i = 0; i < 4; ++i) o[n++] = reinterpret_cast<uint32_t*>(smem)[t * 4 + i];
}

// A TMA load of a box at (c0, c1), its bytes as they lie in shared memory, and a TMA store of it to the same place of another array.
extern "C" __global__ void conformance_tma(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, uint32_t* out,
                                           int box_bytes, int c0, int c1) {
  const int t = threadIdx.x;
  const uint32_t s = ptx::smem_u32(smem), bar = s + 16384;
  if (t == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_mbar_init();
  }
  ptx::syncthreads();
  if (t == 0) {
    ptx::mbar_arrive_expect_tx(bar, box_bytes);
    ptx::tma_load_3d(s, &from, bar, c0, c1, 0);
  }
  ptx::mbar_wait(bar, 0);
  for (int i = t; i < box_bytes / 4; i += 128) out[i] = reinterpret_cast<uint32_t*>(smem)[i];
  ptx::fence_proxy_async();
  ptx::syncthreads();
  if (t == 0) {
    ptx::tma_store_3d(&to, s, c0, c1, 0);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// wgmma with both operands in shared memory and with A in registers, over two steps of 16 along K. Shared memory is filled linearly,
// so that the descriptors decide which element is which. out: 64 floats per thread.
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void conformance_wgmma(float* out, int lbo, int sbo, int swizzle, int k_step) {
  const int t = threadIdx.x;
  const uint32_t s = ptx::smem_u32(smem);
  for (int i = t; i < 8192; i += 128) reinterpret_cast<uint32_t*>(smem)[i] = pair(i);
  ptx::fence_proxy_async();
  ptx::syncthreads();
  float d[32], e[32];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = pair(t * 4 + i + 77);
  ptx::wgmma_fence();
  for (int k = 0; k < 2; ++k) {
    const uint64_t a_tile = ptx::wgmma_desc(s + k * k_step, lbo, sbo, swizzle),
                   b_tile = ptx::wgmma_desc(s + 16384 + k * k_step, lbo, sbo, swizzle);
    ptx::wgmma_m64n64k16_ss<TRANSPOSE_A, TRANSPOSE_B>(d, a_tile, b_tile, k);
    ptx::wgmma_m64n64k16_rs<TRANSPOSE_B>(e, a, b_tile, k);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) {
    out[t * 64 + i] = d[i];
    out[t * 64 + 32 + i] = e[i];
  }
}
extern "C" __global__ void conformance_wgmma_00(float* out, int lbo, int sbo, int swizzle, int k_step) {
  conformance_wgmma<0, 0>(out, lbo, sbo, swizzle, k_step);
}
extern "C" __global__ void conformance_wgmma_11(float* out, int lbo, int sbo, int swizzle, int k_step) {
  conformance_wgmma<1, 1>(out, lbo, sbo, swizzle, k_step);
}
extern "C" __global__ void conformance_wgmma_01(float* out, int lbo, int sbo, int swizzle, int k_step) {
  conformance_wgmma<0, 1>(out, lbo, sbo, swizzle, k_step);
}

#define CHECK(call)                                                                                                        \
  do {                                                                                                                     \
    const int error = (int)(call);                                                                                         \
    if (error) printf("CUDA error %d at line %d: %s\n", error, __LINE__, cudaGetErrorString((cudaError_t)error)), exit(1); \
  } while (0)

// An array on the host with its copy on the device; launches copy there and back.
struct Buffer {
  std::vector<char> host;
  void* device = nullptr;
  explicit Buffer(size_t bytes) : host(bytes) { CHECK(cudaMalloc(&device, bytes)); }
  ~Buffer() { cudaFree(device); }
  void upload() { CHECK(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice)); }
  void download() { CHECK(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost)); }
};

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int threads, int shared_bytes, const std::vector<Buffer*>& buffers, Arguments... arguments) {
  for (Buffer* buffer : buffers) buffer->upload();
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<1, threads, shared_bytes>>>(arguments...);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  for (Buffer* buffer : buffers) buffer->download();
}

// 72 rows of 64 elements in rows of 80.
TensorMap make_map(const Buffer& buffer, int swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  const uint64_t dim[3] = {64, 72, 1}, stride[2] = {160, 160 * 72};
  const uint32_t box[3] = {swizzle ? swizzle / 2u : 64u, 64, 1}, element_stride[3] = {1, 1, 1};
  const CUtensorMapSwizzle mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  CHECK(reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, buffer.device, dim, stride,
                                                                      box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, mode,
                                                                      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

int main(int argc, char** argv) {
  FILE* file = fopen(argc > 1 ? argv[1] : "conformance_sm90.bin", "wb");
  if (!file) return printf("cannot write the file\n"), 1;

  Buffer words(8192 * 4);
  for (uint32_t i = 4096; i < 8192; ++i) reinterpret_cast<uint32_t*>(words.host.data())[i] = i * 2654435761u;
  launch(conformance_warp, 32, 4096, {&words}, (uint32_t*)words.device);
  fwrite(words.host.data(), 4, 32 * 64, file);

  const int places[4][2] = {{0, 0}, {0, 32}, {0, 64}, {-8, -3}};  // inside; over the end; beyond all but 8 rows; before the beginning
  for (int swizzle : {0, 32, 64, 128})
    for (const auto& place : places) {
      Buffer from(72 * 80 * 2), to(72 * 80 * 2), raw(2048 * 4);
      for (int i = 0; i < 72 * 80; ++i) reinterpret_cast<uint16_t*>(from.host.data())[i] = i;
      const int box_bytes = (swizzle ? swizzle : 128) * 64;
      launch(conformance_tma, 128, 16640, {&from, &to, &raw}, make_map(from, swizzle), make_map(to, swizzle), (uint32_t*)raw.device,
             box_bytes, place[0], place[1]);
      fwrite(raw.host.data(), 1, box_bytes, file);
      fwrite(to.host.data(), 2, 72 * 80, file);
    }

  Buffer sums(128 * 64 * 4);
  struct {
    void (*kernel)(float*, int, int, int, int);
    int lbo, sbo, swizzle, k_step;
  } products[] = {
      {conformance_wgmma_00, 16, 1024, 1, 32},    {conformance_wgmma_00, 16, 512, 2, 32},      {conformance_wgmma_00, 16, 256, 3, 2048},
      {conformance_wgmma_00, 1024, 128, 0, 2048}, {conformance_wgmma_11, 8192, 1024, 1, 2048}, {conformance_wgmma_11, 4096, 512, 2, 1024},
      {conformance_wgmma_11, 2048, 256, 3, 512},  {conformance_wgmma_11, 1024, 128, 0, 2048},  {conformance_wgmma_01, 16, 1024, 1, 2048},
  };
  for (const auto& p : products) {
    launch(p.kernel, 128, 32768, {&sums}, (float*)sums.device, p.lbo, p.sbo, p.swizzle, p.k_step);
    fwrite(sums.host.data(), 4, 128 * 64, file);
  }
  fclose(file);
  printf("written\n");
  return 0;
}
